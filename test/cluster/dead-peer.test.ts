import type { ChildProcess } from 'node:child_process';
import { on } from 'node:events';
import { createInterface } from 'node:readline';
import { afterEach, describe, expect, it } from 'vitest';
import { Testbed, type TestbedHost } from '../../src/testbed/index.js';

const lib = new URL('../../dist/src/cluster/index.js', import.meta.url).href;

const SERVER = `
  import { createPeerServer, listenForPeers, loadClusterConfig, sendEvents } from '${lib}';
  const config = loadClusterConfig(process.argv[1]);
  const server = createPeerServer(config);
  async function* ticks() { yield 'tick'; await new Promise(() => {}); }
  server.post('/v1/forever', () => { console.log('asked'); return new Promise(() => {}); });
  server.get('/v1/ticks', (request, reply) => sendEvents(request, reply, ticks()));
  await listenForPeers(server, config);
  console.log('ready');
`;
// Asks for two things that never end, says how they end, and then, for each line, pings.
const CLIENT = `
  import { createInterface } from 'node:readline';
  import { Cluster, loadClusterConfig } from '${lib}';
  const cluster = new Cluster(loadClusterConfig(process.argv[1]));
  const peer = cluster.peer('h2');
  await peer.warm(2);
  const told = (what) => (error) => console.log(what, error.code, error.message);
  peer.request('POST', '/v1/forever', { timeoutMs: 3600000 }).catch(told('request'));
  (async () => {
    for await (const event of peer.events('/v1/ticks')) console.log('event', event);
  })().catch(told('events'));
  for await (const line of createInterface(process.stdin)) {
    await peer.ping().then(() => console.log('ping ok'), told('ping'));
  }
  cluster.close();
`;

/** A child's lines, taken one after another as they are waited for. */
function lines(child: ChildProcess): (matching: RegExp) => Promise<string> {
  if (!child.stdout) throw new Error('no stdout');
  const events = on(createInterface(child.stdout), 'line', { close: ['close'] });
  const seen: string[] = [];
  return async (matching) => {
    for (;;) {
      const at = seen.findIndex((line) => matching.test(line));
      const found = seen[at];
      if (found !== undefined) {
        seen.splice(at, 1);
        return found;
      }
      const next = await events.next();
      if (next.done) throw new Error(`ended without ${matching}: ${seen.join(' | ')}`);
      seen.push(String((next.value as unknown[])[0]));
    }
  };
}

let testbed: Testbed | undefined;
afterEach(async () => {
  await testbed?.destroy();
  testbed = undefined;
});

describe('a host cut off without a word', () => {
  it('fails what waits for it with its name, and is reached again afterwards', async () => {
    const bed = await Testbed.create({ hosts: 2 });
    testbed = bed;
    const [h1, h2] = bed.hosts;
    if (!h1 || !h2) throw new Error('two hosts');
    const start = (host: TestbedHost, script: string): ChildProcess =>
      bed.spawnIn(host, [process.execPath, '--input-type=module', '-e', script, host.configPath], {
        stdio: ['pipe', 'pipe', 'inherit'],
      });
    const serverSays = lines(start(h2, SERVER));
    await serverSays(/^ready$/);
    const client = start(h1, CLIENT);
    const clientSays = lines(client);
    await serverSays(/^asked$/);
    await clientSays(/^event tick$/);
    bed.cut(h2);
    expect(await clientSays(/^request/)).toMatch(/^request E_PEER h2 .*does not answer/);
    expect(await clientSays(/^events/)).toMatch(/^events E_PEER h2 does not answer/);
    client.stdin?.write('ping\n');
    expect(await clientSays(/^ping/)).toMatch(/^ping E_(PEER|TIMEOUT) h2/);
    bed.heal(h2);
    client.stdin?.write('ping\n');
    expect(await clientSays(/^ping/)).toBe('ping ok');
  });
});
