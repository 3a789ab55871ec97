import { expect, test } from 'vitest';
import { execute, newSeed } from './support.js';
import { Authority, HOST, keyFile, serveTls } from './tls-support.js';

const MIB = 2 ** 20;

async function mutual() {
  const authority = await Authority.make();
  const directory = await authority.issue('server', 'server');
  const client = await authority.issue('client', 'client');
  const tls = await serveTls({ directory });
  return { ...tls, authority, directory, client, good: tls.uri({ 'tls-certificates': client }) };
}

const size = async (uri: string) => (await execute('nbdinfo', ['--size', uri])).stdout.trim();

test('libnbd with a certificate of the authority gets in', async () => {
  const { good, server } = await mutual();
  const { stdout } = await execute('nbdinfo', ['--json', good]);
  expect(JSON.parse(stdout)).toMatchObject({
    TLS: true,
    structured: true,
    exports: [{ 'export-name': 'disk', 'export-size': 64 * MIB }],
  });
  expect(server.stats().tls.failed).toBe(0);
});

test('QEMU with tls-creds-x509 gets in, reads and writes', async () => {
  const { client, place } = await mutual();
  const creds = `tls-creds-x509,id=tls0,dir=${client},endpoint=client`;
  const image = `driver=nbd,host=${HOST},port=${place.port},export=disk,tls-creds=tls0`;
  const info = await execute('qemu-img', ['info', '--object', creds, '--image-opts', image]);
  expect(info.stdout).toContain('64 MiB');
  const io = await execute('qemu-io', [
    ...['--object', creds, '--image-opts', image],
    ...['-c', 'write -P 0x5a 12345 5M', '-c', 'read -P 0x5a 12345 5M', '-c', 'flush'],
  ]);
  expect(io.stdout).not.toMatch(/fail|error/i);
  expect(io.stdout).toContain('read 5242880/5242880');
});

test('libnbd and QEMU with a pre-shared key get in, no other key does', async () => {
  const [keys, others] = [await keyFile('alice'), await keyFile('alice')];
  const { uri, server } = await serveTls({ pskFile: keys });
  expect(await size(uri({ 'tls-psk-file': keys }, 'alice'))).toBe(String(64 * MIB));
  expect(server.stats().tls).toMatchObject({ accepted: 1, failed: 0 });
  await expect(size(uri({ 'tls-psk-file': others }, 'alice'))).rejects.toThrow();
  await expect(size(uri({ 'tls-psk-file': await keyFile('bob') }, 'bob'))).rejects.toThrow();
  expect(server.stats().tls).toMatchObject({ accepted: 1, failed: 2 });
});

test('nbdcopy in and out of four TLS connections gives the same bytes', async () => {
  const { good } = await mutual();
  const seed = newSeed('nbdcopy over TLS');
  const plugin = `[ nbdkit sparse-random size=${64 * MIB} percent=60 seed=${seed} ]`.split(' ');
  await execute('nbdcopy', ['--connections=4', ...plugin, good]);
  await execute('nbdcopy', ['--connections=4', good, ...plugin]);
});
