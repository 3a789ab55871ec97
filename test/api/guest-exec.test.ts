import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { text } from 'node:stream/consumers';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { ExecSession, GuestChannel } from '../../src/api/guest-channel.js';
import { OUTPUT_WINDOW_BYTES } from '../../src/api/guest-channel-exec.js';
import { AgentRig, identityOf } from './agent-rig.js';

const STREAM_BYTES = 10 << 20;
let rig: AgentRig;
let channel: GuestChannel;
const identity = identityOf(0);
beforeEach(async () => {
  rig = await AgentRig.start();
  channel = await rig.channel();
  await channel.hello(identity);
});
afterEach(async () => {
  const errors = rig.agentErrors;
  await rig.stop();
  expect(errors).toBe('');
});

const shell = (script: string) => channel.exec({ argv: ['sh', '-c', script] });

async function hashOf(stream: AsyncIterable<Buffer>): Promise<string> {
  const hash = createHash('sha256');
  for await (const data of stream) hash.update(data);
  return hash.digest('hex');
}

async function outcome(session: ExecSession) {
  session.stdin.end();
  const [stdout, stderr, exit] = await Promise.all([
    text(session.stdout),
    text(session.stderr),
    session.exited,
  ]);
  return { stdout, stderr, ...exit };
}

describe('exec', () => {
  it('gives output, error output and status', async () => {
    expect(await outcome(shell('echo out; echo err >&2; exit 7'))).toEqual({
      stdout: 'out\n',
      stderr: 'err\n',
      status: 7,
    });
  });

  it('passes arguments and environment as they are', async () => {
    const argv = ['sh', '-c', 'printf "%s|" "$@"; env', 'sh', '', 'a b', 'ü%=\n'];
    const session = channel.exec({ argv, env: { A: 'x y', PATH: '/usr/bin:/bin' } });
    const { stdout } = await outcome(session);
    expect(stdout).toMatch(/^\|a b\|ü%=\n\|/);
    expect(stdout).toContain('A=x y\n');
    expect(stdout).not.toContain('HOME=');
  });

  it('says what cannot be run', async () => {
    const { status, stderr } = await outcome(channel.exec({ argv: ['/no/such/program'] }));
    expect(status).toBe(127);
    expect(stderr).toContain('/no/such/program');
  });

  it(`carries ${STREAM_BYTES} bytes each way at once, byte for byte`, async () => {
    const data = randomBytes(STREAM_BYTES);
    const session = channel.exec({ argv: ['cat'] });
    session.stderr.resume();
    const hash = hashOf(session.stdout);
    session.stdin.end(data);
    expect(await hash).toBe(createHash('sha256').update(data).digest('hex'));
    expect(await session.exited).toEqual({ status: 0 });
  });

  it('carries two full outputs that are read one after the other', async () => {
    const session = shell(
      `head -c ${STREAM_BYTES} /dev/zero & head -c 100000 /dev/zero | tr "\\0" x >&2; wait`,
    );
    session.stdin.end();
    const out = await hashOf(session.stdout);
    expect(out).toBe(createHash('sha256').update(Buffer.alloc(STREAM_BYTES)).digest('hex'));
    expect((await text(session.stderr)).length).toBe(100_000);
    expect(await session.exited).toEqual({ status: 0 });
  });

  it('makes a program wait whose output nobody reads, and others go on', async () => {
    const session = shell('yes 0123456789');
    await once(session.stdout, 'readable');
    expect(await outcome(shell('echo through'))).toMatchObject({ stdout: 'through\n' });
    expect(session.stdout.readableLength).toBeLessThanOrEqual(OUTPUT_WINDOW_BYTES);
    session.signal(15);
    session.stdout.resume();
    session.stderr.resume();
    expect(await session.exited).toEqual({ signal: 15 });
  });

  it('makes the writer wait for a program that does not read', async () => {
    const session = shell('sleep 600');
    const taken = session.stdin.write(Buffer.alloc(1 << 20));
    expect(taken).toBe(false);
    expect(await channel.ping(5000)).toBeGreaterThan(0);
    session.signal(9);
    session.stdout.resume();
    session.stderr.resume();
    expect(await session.exited).toEqual({ signal: 9 });
  });

  it('ends a session whose program ended though a child keeps its output open', async () => {
    const result = await outcome(shell('sleep 600 & echo $!'));
    expect(result.status).toBe(0);
    process.kill(Number(result.stdout), 'SIGKILL');
  });

  it('gives a terminal of the size asked for', async () => {
    const session = channel.exec({
      argv: ['sh', '-c', 'tty; stty size; read x; echo got $x'],
      tty: { rows: 31, cols: 97 },
    });
    session.stdin.write('line\n');
    const stdout = await text(session.stdout);
    expect(stdout).toContain('/dev/pts/');
    expect(stdout).toContain('31 97');
    expect(stdout).toContain('got line');
    expect(await session.exited).toEqual({ status: 0 });
  });

  it('detaches sessions over a fork: the program runs on, the host hears no more of it', async () => {
    const session = shell('echo $$; read x; while :; do echo more; done');
    const pid = await new Promise<number>((resolve) => {
      session.stdout.once('data', (data: Buffer) => resolve(Number(data.toString())));
    });
    const clone = await rig.channel();
    await clone.hello(identityOf(2));
    await expect(session.exited).rejects.toMatchObject({ code: 'E_CLOSED' });
    expect(await clone.ping(5000)).toBeGreaterThan(0);
    process.kill(pid, 'SIGKILL');
  });

  it('refuses more sessions than there is room for, and takes new ones later', async () => {
    const sessions = Array.from({ length: 16 }, () => shell('cat'));
    const extra = shell('true');
    await expect(extra.exited).rejects.toMatchObject({ code: 'E_CAPACITY' });
    await Promise.all(sessions.map(outcome));
    expect((await outcome(shell('true'))).status).toBe(0);
  });

  it('rejects what waits when the channel closes', async () => {
    const session = shell('cat');
    const ping = channel.ping(60_000);
    channel.close();
    await expect(session.exited).rejects.toMatchObject({ code: 'E_CLOSED' });
    await ping.catch(() => {});
    expect(() => shell('true')).toThrowError(/closed/);
  });
});
