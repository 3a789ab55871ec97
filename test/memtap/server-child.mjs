// A data plane in a process of its own, so that a test can kill it. Arguments: the addon, the socket.
// One JSON array [object, method, ...arguments] a line on stdin; one JSON answer a line on stdout.
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const addon = createRequire(import.meta.url)(process.argv[2]);
const options = { socketPath: process.argv[3], socketMode: 0o666, socketUid: -1, socketGid: -1 };
const server = new addon.MemtapServer({ ...options, populate: false, saveWaitMs: 1000 }, () => {});
const replicas = new Map();
const sources = [];

const tools = {
  replica(name, path, pages, medium) {
    replicas.set(name, new addon.Replica(path, '0'.repeat(32), pages, medium));
  },
  expectClone(id, ramBytes, name) {
    server.expect(id, 'secret', ramBytes, replicas.get(name).handle);
  },
  connect(name, from) {
    const source = replicas.get(from).provider;
    sources.push(new addon.LocalSource(replicas.get(name).handle, source, 1000));
  },
  waiting: (name) => replicas.get(name).stats().waiting,
};

createInterface({ input: process.stdin }).on('line', async (line) => {
  const [object, method, ...rest] = JSON.parse(line);
  try {
    const value = await (object === 'server' ? server : tools)[method](...rest);
    console.log(JSON.stringify({ value: value ?? null }));
  } catch (error) {
    console.log(JSON.stringify({ code: error.code, message: error.message }));
  }
});
console.log(JSON.stringify({ value: 'ready' }));
