// A host of the tests: a process in its own network namespace that runs real servers and clients
// and does what its parent tells it over IPC. Messages: {id, op, args} -> {id, value} or {id, error}.
import { createHash } from 'node:crypto';
import { createSocket } from 'node:dgram';
import { createRequire } from 'node:module';

const native = createRequire(import.meta.url)('../../build/Release/dataplane.node');
const PAGE_BYTES = 4096;
const objects = new Map(); // by name
const key = (hex) => Buffer.from(hex, 'hex');

/** The page that all tests expect: from seed and number alone; each eighth is zero if `zeros`. */
function pageOf(seed, page) {
  const out = Buffer.alloc(PAGE_BYTES);
  let state = (seed * 2654435761 + page * 40503 + 1) >>> 0;
  for (let at = 0; at < PAGE_BYTES; at += 4) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    out.writeUInt32LE(state >>> 0, at);
  }
  return out;
}

function send(port, address, packet, interfaceAddress) {
  return new Promise((resolve, reject) => {
    const socket = createSocket('udp4');
    socket.bind(0, () => {
      if (interfaceAddress !== undefined) socket.setMulticastInterface(interfaceAddress);
      socket.send(packet, port, address, (error) => {
        socket.close();
        error ? reject(error) : resolve();
      });
    });
  });
}

const operations = {
  replica({ name, path, generation, pages, medium }) {
    objects.set(name, new native.Replica(path, generation, pages, medium));
  },
  fillSource({ name, seed, from = 0, count, zeros = [], packs = [0, 0] }) {
    const replica = objects.get(name);
    for (let page = from; page < from + count; page++) {
      if (zeros.some(([first, n]) => page >= first && page < first + n)) replica.fillZero(page, 1);
      else {
        const bytes = pageOf(seed, page);
        if (page >= packs[0] && page < packs[0] + packs[1]) bytes.fill(page & 0xff, 512);
        replica.fill(page, bytes);
      }
    }
  },
  digest({ name, pages }) {
    const hash = createHash('sha256');
    const replica = objects.get(name);
    for (const page of pages ?? Array(replica.stats().pages).keys()) {
      const bytes = replica.read(page);
      if (bytes === null) return `absent ${page}`;
      hash.update(bytes);
    }
    return hash.digest('hex');
  },
  replicaStats: ({ name }) => objects.get(name).stats(),
  server({ name, ...options }) {
    const server = new native.McdistServer(options);
    objects.set(name, server);
    return server.port;
  },
  serve({ name, provider, keyHex, ...options }) {
    objects
      .get(name)
      .serve({ ...options, key: key(keyHex), provider: objects.get(provider).provider });
  },
  client({ name, replica, keyHex, ...options }) {
    const handle = objects.get(replica).handle;
    objects.set(name, new native.McdistClient({ ...options, key: key(keyHex), replica: handle }));
  },
  fetch: ({ name, pages }) => Promise.all(pages.map((page) => objects.get(name).fetch(page))),
  fetchAll({ name, count }) {
    const client = objects.get(name);
    return Promise.all(Array.from({ length: count }, (_, page) => client.fetch(page)));
  },
  /** Prefetches all and resolves with the seconds it took. */
  async prefetchAll({ name, replica, count }) {
    const begin = process.hrtime.bigint();
    objects.get(name).prefetch(0, count);
    for (;;) {
      const { present, zero } = objects.get(replica).stats();
      if (present + zero >= count) return Number(process.hrtime.bigint() - begin) / 1e9;
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
  },
  prefetcher({ name, replica }) {
    objects.set(name, new native.Prefetcher(objects.get(replica).handle, () => {}));
  },
  /** One page after the other, on a thread that waits for each; microseconds each took. */
  fetchTimed: ({ replica, from, count, handedOver }) =>
    native.mcdistBench.fetch(objects.get(replica).handle, from, count, handedOver),
  benchServer: ({ address }) => native.mcdistBench.server(address),
  roundTrips: ({ kind, address, port, count }) =>
    native.mcdistBench.roundTrips(kind, address, port, count),
  cpu: () => process.cpuUsage(),
  call: ({ name, method, args = [] }) => objects.get(name)[method](...args),
  stats: ({ name, generation }) => objects.get(name).stats(generation),
  close: ({ name }) => objects.get(name).close(),
  send: ({ port, address, hex, interfaceAddress }) =>
    send(port, address, Buffer.from(hex, 'hex'), interfaceAddress),
  /** Keeps what comes to a group, or to an address; resolves with the port once it listens. */
  sniff({ group, port, interfaceAddress, name }) {
    const socket = createSocket({ type: 'udp4', reuseAddr: true });
    const packets = [];
    objects.set(name, { packets, socket });
    socket.on('message', (message) => packets.push(message.toString('hex')));
    return new Promise((resolve) => {
      socket.bind(port, group ?? interfaceAddress, () => {
        if (group !== undefined) socket.addMembership(group, interfaceAddress);
        resolve(socket.address().port);
      });
    });
  },
  packets: ({ name }) => objects.get(name).packets,
  /** Passes a client's packets on to a server and the answers back, and keeps the former. */
  relay({ name, interfaceAddress, server }) {
    const front = createSocket('udp4');
    const back = createSocket('udp4');
    const packets = [];
    let client;
    objects.set(name, { packets });
    front.on('message', (message, from) => {
      client = from;
      packets.push(message.toString('hex'));
      back.send(message, server.port, server.address);
    });
    back.on('message', (message) => front.send(message, client.port, client.address));
    return new Promise((resolve) => {
      front.bind(0, interfaceAddress, () => resolve(front.address().port));
    });
  },
  /**
   * Sends what it hears in a group once more, and twice altered: one bit of it, and the generation
   * it names.
   */
  echo({ name, group, port, interfaceAddress }) {
    const listener = createSocket({ type: 'udp4', reuseAddr: true });
    const sender = createSocket('udp4');
    const packets = [];
    objects.set(name, { packets });
    listener.on('message', (message) => {
      packets.push(message.length);
      const altered = Buffer.from(message);
      altered[packets.length % message.length] ^= 1 << (packets.length % 8);
      const foreign = Buffer.from(message);
      foreign[4] ^= 0x80;
      for (const packet of [message, altered, foreign]) sender.send(packet, port, group);
    });
    return new Promise((resolve) => {
      sender.bind(0, interfaceAddress, () => {
        sender.setMulticastInterface(interfaceAddress);
        sender.setMulticastLoopback(false); // or it would hear itself
        listener.bind(port, group, () => {
          listener.addMembership(group, interfaceAddress);
          resolve();
        });
      });
    });
  },
  /** Sends datagrams, 32 at a time, and resolves with what came back for them. */
  async askAll({ port, address, hexes }) {
    const socket = createSocket('udp4');
    const replies = [];
    let wake = () => {};
    socket.on('message', (message) => {
      replies.push(message.toString('hex'));
      wake();
    });
    for (let at = 0; at < hexes.length; at += 32) {
      const some = hexes.slice(at, at + 32);
      const least = replies.length + some.length;
      for (const hex of some) socket.send(Buffer.from(hex, 'hex'), port, address);
      while (replies.length < least) {
        await new Promise((resolve) => {
          wake = resolve;
        });
      }
    }
    socket.close();
    return replies;
  },
  /** Sends a datagram and resolves with the first that comes back. */
  ask({ port, address, hex, ms }) {
    return new Promise((resolve) => {
      const socket = createSocket('udp4');
      const end = (reply) => {
        clearTimeout(timer);
        socket.close();
        resolve(reply);
      };
      const timer = setTimeout(() => end(null), ms);
      socket.on('message', (message) => end(message.toString('hex')));
      socket.send(Buffer.from(hex, 'hex'), port, address);
    });
  },
  /** Resolves once a counter of an object's stats has reached `least`. */
  async reached({ name, counter, least }) {
    const end = Date.now() + 60_000;
    while (objects.get(name).stats()[counter] < least) {
      if (Date.now() > end) {
        throw new Error(`${counter} < ${least}: ${JSON.stringify(objects.get(name).stats())}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
  },
};

process.on('message', async ({ id, op, args }) => {
  try {
    process.send({ id, value: await operations[op](args) });
  } catch (error) {
    process.send({ id, error: { code: error.code, message: error.message } });
  }
});
process.on('disconnect', () => process.exit(0));
process.send({ ready: true });
