import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { QmpClient, type QmpEvent } from '../../src/hypervisor/qemu/qmp.js';
import { type Bed, makeBed } from './harness.js';

const GREETING = '{"QMP":{"version":{},"capabilities":[]}}\n';
const cleanup: (() => Promise<unknown> | unknown)[] = [];
let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'sf-qmp-'));
  cleanup.push(() => rmSync(folder, { recursive: true, force: true }));
});
afterEach(async () => {
  for (const step of cleanup.splice(0).reverse()) await step();
});

/** A peer that is not QEMU: it greets and then does as `serve` says. */
async function peer(serve: (socket: Socket) => void): Promise<string> {
  const path = join(folder, 'peer.sock');
  const sockets: Socket[] = [];
  const server: Server = createServer((socket) => {
    sockets.push(socket);
    socket.on('error', () => {});
    serve(socket);
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  cleanup.push(() => {
    for (const socket of sockets) socket.destroy();
    return new Promise((resolve) => server.close(resolve));
  });
  return path;
}

/** Greets, answers the first command (qmp_capabilities), and gives the rest to `then`. */
function afterHandshake(then: (socket: Socket) => void): (socket: Socket) => void {
  return (socket) => {
    socket.write(GREETING);
    socket.once('data', () => {
      socket.write('{"return":{},"id":1}\n');
      then(socket);
    });
  };
}

async function ofBed(): Promise<{ bed: Bed; client: QmpClient }> {
  const bed = makeBed();
  cleanup.push(() => bed.end());
  const vm = await bed.boot('vm');
  // The driver holds the first monitor; this is the second one.
  const client = await QmpClient.connect(vm.record.watchdog_socket);
  cleanup.push(() => client.close());
  return { bed, client };
}

test('commands, refusals and events of a real QEMU', async () => {
  const { client } = await ofBed();
  const version = await client.execute('query-version', {});
  expect(version.qemu.major).toBeGreaterThanOrEqual(7);
  await expect(client.execute('migrate', { uri: 'nonsense:' })).rejects.toMatchObject({
    code: 'E_QEMU',
    command: 'migrate',
    qmpClass: 'GenericError',
  });
  const stopped = new Promise<QmpEvent>((resolve) => {
    client.on('event', (event) => event.event === 'STOP' && resolve(event));
  });
  await client.execute('stop', {});
  expect(Math.abs((await stopped).atMs - Date.now())).toBeLessThan(60_000);
  expect(await client.execute('query-status', {})).toMatchObject({ running: false });
});

test('many commands at once are each answered with their own reply', async () => {
  const { client } = await ofBed();
  const answers = await Promise.all(
    Array.from({ length: 40 }, (_, i) =>
      i % 2 === 0
        ? client.execute('query-status', {}).then((s) => s.status)
        : client.execute('human-monitor-command', { 'command-line': 'info version' }),
    ),
  );
  answers.forEach((answer, i) => {
    expect(answer).toMatch(i % 2 === 0 ? /^running$/ : /^\d+\.\d+\.\d+/);
  });
});

test('a monitor that another client holds gives E_TIMEOUT, not a wait without end', async () => {
  const { bed } = await ofBed();
  const path = join(bed.folder, 'vm', 'watchdog.sock');
  await expect(QmpClient.connect(path, 100)).rejects.toMatchObject({ code: 'E_TIMEOUT' });
});

test('a command without answer ends at its time limit, and a late answer harms nothing', async () => {
  let late: (() => void) | undefined;
  const path = await peer(
    afterHandshake((socket) => {
      socket.on('data', (chunk: Buffer) => {
        const { id, execute } = JSON.parse(chunk.toString()) as { id: number; execute: string };
        if (execute === 'stop') late = () => socket.write(`{"return":{},"id":${id}}\n`);
        else {
          late?.();
          socket.write(`{"return":{"running":true,"status":"running"},"id":${id}}\n`);
        }
      });
    }),
  );
  const client = await QmpClient.connect(path);
  await expect(client.execute('stop', {}, 50)).rejects.toMatchObject({ code: 'E_TIMEOUT' });
  expect(await client.execute('query-status', {})).toEqual({ running: true, status: 'running' });
  client.close();
});

test('waiting commands fail when the connection breaks', async () => {
  const path = await peer(afterHandshake((socket) => socket.on('data', () => socket.destroy())));
  const client = await QmpClient.connect(path);
  const waiting = [client.execute('stop', {}), client.execute('cont', {})];
  for (const command of waiting) await expect(command).rejects.toMatchObject({ code: 'E_CLOSED' });
  expect(client.closed).toBe(true);
  await expect(client.execute('cont', {})).rejects.toMatchObject({ code: 'E_CLOSED' });
});

test.each([
  ['a line without end', 'x'.repeat(5 << 20)],
  ['bytes that are no JSON', 'garbage\n'],
  ['JSON that is no message', '[1]\n'],
])('%s closes the connection', async (_, bytes) => {
  const path = await peer(afterHandshake((socket) => socket.write(bytes)));
  const client = await QmpClient.connect(path);
  await expect(client.execute('stop', {})).rejects.toMatchObject({ code: 'E_CLOSED' });
});

test('messages cut anywhere between two reads are put together again', async () => {
  const path = await peer(
    afterHandshake((socket) => {
      socket.setNoDelay(true);
      socket.on('data', async (chunk: Buffer) => {
        const { id } = JSON.parse(chunk.toString()) as { id: number };
        const event = '{"event":"STOP","timestamp":{"seconds":1,"microseconds":500}}\r\n';
        for (const byte of `${event}{"return":{"ä":"€"},"id":${id}}\r\n`) {
          socket.write(byte);
          await new Promise(setImmediate);
        }
      });
    }),
  );
  const client = await QmpClient.connect(path);
  const events: QmpEvent[] = [];
  client.on('event', (event) => events.push(event));
  expect(await client.execute('stop', {})).toEqual({ ä: '€' });
  expect(events).toEqual([{ event: 'STOP', data: {}, atMs: 1000.5 }]);
  client.close();
});
