import { join } from 'node:path';
import { expect, test } from 'vitest';
import { initCluster } from '../../src/cluster/index.js';
import { execute, temporary } from '../blktap/support.js';
import { serve, snowflock } from './snowflock.js';

/** A store with one disk of 16 MiB, and the folders of a cluster of two hosts. */
async function storeAndCluster() {
  const folder = await temporary();
  const hosts = ['127.0.0.1', '127.0.0.2'].map((address, at) => ({ name: `h${at + 1}`, address }));
  await initCluster({ dir: join(folder, 'cluster'), hosts });
  const store = join(folder, 's');
  expect((await snowflock(['disk', 'create', `${store}/web`, '--size', '16M'])).status).toBe(0);
  const tls = (host: string) => join(folder, 'cluster', 'hosts', host, 'nbd-tls');
  return { store, tls };
}

test('disk serve --listen: another host of the cluster reads and writes, a stranger does not', async () => {
  const { store, tls } = await storeAndCluster();
  const options = ['--listen', '127.0.0.1:0', '--tls-dir', tls('h1')];
  const serving = await serve([store, ...options], 1);
  const uri = serving.tcpUris.get('web') ?? '';
  expect(uri).toMatch(/^nbds:\/\/127\.0\.0\.1:\d+\/web$/);
  const port = uri.replace(/.*:(\d+).*/, '$1');
  const creds = `tls-creds-x509,id=tls0,dir=${tls('h2')},endpoint=client`;
  const image = `driver=nbd,host=127.0.0.1,port=${port},export=web,tls-creds=tls0`;
  const write = ['-c', 'write -P 7 0 1M', '-c', 'flush'];
  await execute('qemu-io', ['--object', creds, '--image-opts', image, ...write]);
  const local = await execute('qemu-io', [
    ...['-f', 'raw', '-c', 'read -P 7 0 1M', serving.uris.get('web') ?? ''],
  ]);
  expect(local.stdout).toContain('read 1048576/1048576');
  const info = await execute('nbdinfo', ['--size', `${uri}?tls-certificates=${tls('h2')}`]);
  expect(info.stdout.trim()).toBe(String(16 * 2 ** 20));
  await expect(execute('nbdinfo', ['--size', uri])).rejects.toThrow();
  serving.kill('SIGTERM');
  expect((await serving.ended).status).toBe(0);
});

test('disk serve --listen is refused without credentials, and with such as cannot be read', async () => {
  const { store, tls } = await storeAndCluster();
  const listen = ['--listen', '127.0.0.1:0'];
  for (const [args, status, message] of [
    [listen, 2, '--tls-dir'],
    [['--tls-dir', tls('h1')], 2, '--listen'],
    [['--no-tls-verify-peer'], 2, '--listen'],
    [['--listen', 'localhost:10809', '--tls-dir', tls('h1')], 2, '192.0.2.1:10809'],
    [['--listen', '[127.0.0.1]:1', '--tls-dir', tls('h1')], 2, '192.0.2.1:10809'],
    [['--listen', '127.0.0.1:65536', '--tls-dir', tls('h1')], 2, '192.0.2.1:10809'],
    [[...listen, '--tls-dir', `${tls('h1')}-none`], 2, 'ca-cert.pem'],
    [[...listen, '--tls-psk', `${tls('h1')}-none`], 2, '-none'],
  ] as const) {
    const outcome = await snowflock(['disk', 'serve', store, ...args]);
    expect(outcome.status, args.join(' ')).toBe(status);
    expect(outcome.stderr).toContain(message);
  }
});
