import { once } from 'node:events';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import {
  chunk,
  contextData,
  counted,
  FLAGS,
  infoData,
  NONE,
  OPT,
  option,
  type RawNbd,
  REP,
  type Reply,
  rawNbd,
  request,
  u32,
} from './raw-nbd.js';
import { newDisk, newGeneration, newServer } from './support.js';

const MIB = 2 ** 20;

/** A server with `disk` (the default) and `view`, a generation of it. */
async function twoExports(): Promise<string> {
  const { folder, disk } = await newDisk(MIB);
  const generation = newGeneration();
  await disk.fork(generation);
  const socketPath = join(folder, 'shared');
  const server = await newServer(socketPath);
  await disk.serve({ server, exportName: 'disk', description: 'the top', isDefault: true });
  await disk.serveGeneration(generation, { server, exportName: 'view' });
  return socketPath;
}

async function greeted(socketPath: string): Promise<RawNbd> {
  const raw = await rawNbd(socketPath);
  raw.socket.write(FLAGS);
  return raw;
}

const { ack, invalid, policy, unknown, unsup, tooBig } = REP;
const LIE = u32(0xffffffff);

// What the protocol demands, the option, its data, the types of the replies.
const table: [string, number, Buffer, number[]][] = [
  ['an option that does not exist is unsupported', 0xffffffff, Buffer.alloc(300), [unsup]],
  ['option 0 does not exist', 0, NONE, [unsup]],
  ['PEEK_EXPORT was withdrawn', OPT.peek, NONE, [unsup]],
  ['STARTTLS is against the policy of a Unix socket', OPT.startTls, NONE, [policy]],
  ['EXTENDED_HEADERS is experimental', OPT.extended, NONE, [unsup]],
  ['more data than any option takes', 99, Buffer.alloc(20_000), [tooBig]],
  ['LIST names every export', OPT.list, NONE, [REP.server, REP.server, ack]],
  ['LIST takes no data', OPT.list, Buffer.alloc(1), [invalid]],
  ['STRUCTURED_REPLY takes no data', OPT.structured, Buffer.alloc(1), [invalid]],
  ['INFO without data', OPT.info, NONE, [invalid]],
  ['INFO: a name longer than the data', OPT.info, Buffer.concat([LIE, NONE]), [invalid]],
  ['INFO: the name leaves no room for the count', OPT.info, counted('disk'), [invalid]],
  [
    'INFO: fewer requests than counted',
    OPT.info,
    Buffer.concat([counted('disk'), Buffer.from([0, 9, 0, 1])]),
    [invalid],
  ],
  [
    'INFO: more data than counted',
    OPT.info,
    Buffer.concat([infoData('disk'), Buffer.alloc(1)]),
    [invalid],
  ],
  ['INFO: no such export', OPT.info, infoData('other'), [unknown]],
  ['INFO: a name is compared whole', OPT.info, infoData('dis'), [unknown]],
  ['INFO: a string is at most 4096 bytes', OPT.info, infoData('x'.repeat(4097)), [invalid]],
  ['INFO: one of 4096 bytes may exist', OPT.info, infoData('x'.repeat(4096)), [unknown]],
  ['INFO of the default export', OPT.info, infoData(''), [REP.info, ack]],
  ['INFO: what is asked for', OPT.info, infoData('disk', [1, 2, 3]), Array(4).fill(3).concat(ack)],
  ['INFO: unknown requests are ignored', OPT.info, infoData('disk', [77, 9999]), [REP.info, ack]],
  ['INFO: a request twice is answered once', OPT.info, infoData('disk', [3, 3]), [3, 3, ack]],
  ['GO: no such export, and the phase goes on', OPT.go, infoData('other'), [unknown]],
  ['LIST_META_CONTEXT: no such export', OPT.listContexts, contextData('other', []), [unknown]],
  ['LIST_META_CONTEXT: cut short', OPT.listContexts, counted('disk'), [invalid]],
  [
    'LIST_META_CONTEXT: a count that lies',
    OPT.listContexts,
    Buffer.concat([counted('disk'), LIE]),
    [invalid],
  ],
  [
    'LIST_META_CONTEXT: a query longer than the data',
    OPT.listContexts,
    Buffer.concat([counted('disk'), u32(1), LIE]),
    [invalid],
  ],
  [
    'LIST_META_CONTEXT: no query lists all',
    OPT.listContexts,
    contextData('disk', []),
    [REP.context, REP.context, ack],
  ],
  [
    'LIST_META_CONTEXT: a namespace alone lists what is in it',
    OPT.listContexts,
    contextData('disk', ['qemu:']),
    [REP.context, ack],
  ],
  [
    'LIST_META_CONTEXT: each context once, unknown ones not',
    OPT.listContexts,
    contextData('', ['base:', 'base:allocation', 'base:other', 'x-none:', 'no colon', '']),
    [REP.context, ack],
  ],
  [
    'SET_META_CONTEXT needs structured replies',
    OPT.setContexts,
    contextData('disk', ['base:allocation']),
    [invalid],
  ],
];

test('each option is answered as the protocol says, and the phase goes on', async () => {
  const { socket, ask } = await greeted(await twoExports());
  for (const [what, number, data, types] of table) {
    const replies = await ask(number, data);
    expect(
      replies.map((reply) => reply.type),
      what,
    ).toEqual(types);
    const last = replies.at(-1)?.data.length ?? 0;
    if (types.some((type) => type === invalid || type === unknown)) {
      expect(last, what).toBeGreaterThan(0); // says why
    } else if (types.at(-1) === ack) {
      expect(last, what).toBe(0);
    }
  }
  // After an abort, with data or not, the server ends the connection.
  const closed = once(socket, 'close');
  expect((await ask(OPT.abort, Buffer.alloc(5))).map((reply) => reply.type)).toEqual([ack]);
  socket.end();
  await closed;
});

test('abort is acknowledged and the connection ended, also with more data than other options take', async () => {
  const socketPath = await twoExports();
  for (const bytes of [0, 100_000]) {
    const { socket, reader, ask } = await greeted(socketPath);
    expect((await ask(OPT.abort, Buffer.alloc(bytes))).map((reply) => reply.type)).toEqual([ack]);
    await expect(reader.take(1)).rejects.toThrow();
    socket.destroy();
  }
});

const names = (replies: Reply[], type: number) =>
  replies
    .filter((reply) => reply.type === type)
    .map((reply) => [reply.data.readUInt32BE(0), reply.data.toString('utf8', 4)]);

test('replies carry what the protocol wants', async () => {
  const { ask } = await greeted(await twoExports());
  expect(names(await ask(OPT.list, NONE), REP.server)).toEqual([
    [4, 'diskthe top'],
    [4, 'view'],
  ]);
  const infos = await ask(OPT.info, infoData('', [3, 2, 1]));
  const found = new Map(
    infos.slice(0, -1).map(({ data }) => [data.readUInt16BE(0), data.subarray(2)]),
  );
  expect(found.get(0)?.readBigUInt64BE(0)).toBe(BigInt(MIB));
  expect(found.get(0)?.readUInt16BE(8)).toBe(0b1101_0110_1101);
  expect(found.get(1)?.toString()).toBe('disk'); // the canonical name
  expect(found.get(2)?.toString()).toBe('the top');
  expect(found.get(3)).toEqual(u32(1, 4096, 32 * MIB));
  const view = (await ask(OPT.info, infoData('view')))[0]?.data;
  expect(view?.readUInt16BE(10)).toBe(0b0101_0000_0111); // read-only, and nothing that writes
  expect(names(await ask(OPT.listContexts, contextData('disk', [])), REP.context)).toEqual([
    [0, 'base:allocation'],
    [0, 'qemu:allocation-depth'],
  ]);
});

test('INFO and then GO with the same parameters say the same', async () => {
  const { ask } = await greeted(await twoExports());
  for (let i = 0; i < 2; i++) {
    // Asked for twice it is granted twice.
    expect((await ask(OPT.structured, NONE)).map((reply) => reply.type)).toEqual([ack]);
  }
  const data = infoData('disk', [3, 1]);
  const info = await ask(OPT.info, data);
  expect(info[0]?.data.readUInt16BE(10)).toBe(0b1101_1110_1101); // DF now
  expect(await ask(OPT.go, data)).toEqual(info);
});

/** Sets contexts by these steps, enters `name`, and asks for the state of the first page. */
async function statusAfter(
  socketPath: string,
  steps: [string, string[]][],
  name: string,
): Promise<{ replies: Reply[][]; contexts: number[]; error: number }> {
  const { socket, reader, ask } = await greeted(socketPath);
  await ask(OPT.structured, NONE);
  const replies: Reply[][] = [];
  for (const [of, queries] of steps) {
    replies.push(await ask(OPT.setContexts, contextData(of, queries)));
  }
  await ask(OPT.go, infoData(name));
  socket.write(request(7, 0, 4096, { cookie: 5n }));
  const contexts: number[] = [];
  for (;;) {
    const { done, type, cookie, data } = await chunk(reader);
    expect(cookie).toBe(5n);
    const error = type === 0x8001 ? data.readUInt32BE(0) : 0;
    if (error === 0) contexts.push(data.readUInt32BE(0));
    if (done) return { replies, contexts, error };
  }
}

test('contexts are those of the last selection, for the export that is entered', async () => {
  const socketPath = await twoExports();
  const both = ['base:allocation', 'qemu:allocation-depth'];
  const EINVAL = 22;
  const cases: [string, [string, string[]][], string, number[]][] = [
    ['both', [['disk', both]], 'disk', [1, 2]],
    ['one', [['disk', ['qemu:allocation-depth']]], 'disk', [2]],
    ['the default export by either name', [['', both]], 'disk', [1, 2]],
    [
      'a new selection replaces the old one',
      [
        ['disk', both],
        ['disk', both.slice(0, 1)],
      ],
      'disk',
      [1],
    ],
    [
      'also one of nothing',
      [
        ['disk', both],
        ['disk', []],
      ],
      'disk',
      [],
    ],
    [
      'also one that failed',
      [
        ['disk', both],
        ['other', both],
      ],
      'disk',
      [],
    ],
    [
      'wildcards and unknown names select nothing',
      [['disk', ['base:', 'qemu:', 'qemu:dirty-bitmap:x']]],
      'disk',
      [],
    ],
    ['those of another export are dropped', [['view', both]], 'disk', []],
    ['none at all', [], 'disk', []],
  ];
  for (const [what, steps, name, contexts] of cases) {
    const found = await statusAfter(socketPath, steps, name);
    expect(found.contexts, what).toEqual(contexts);
    expect(found.error, what).toBe(contexts.length === 0 ? EINVAL : 0);
    const last = found.replies.at(-1) ?? [];
    const ids = names(last, REP.context).map(([id]) => id);
    if (name === steps.at(-1)?.[0]) expect(ids, what).toEqual(contexts);
  }
});

test('EXPORT_NAME pads with zeros unless the client waived it', async () => {
  const socketPath = await twoExports();
  for (const [flags, bytes] of [
    [Buffer.from([0, 0, 0, 1]), 134],
    [Buffer.from([0, 0, 0, 0]), 134], // not fixed newstyle: the only option there is
    [FLAGS, 10],
  ] as const) {
    const { socket, reader } = await rawNbd(socketPath);
    socket.write(Buffer.concat([flags, option(OPT.exportName, Buffer.from('disk'))]));
    const answer = await reader.take(bytes);
    expect(answer.readBigUInt64BE(0)).toBe(BigInt(MIB));
    expect(answer.subarray(10)).toEqual(Buffer.alloc(bytes - 10));
    socket.write(request(0, 0, 1, { cookie: 9n })); // and then it is in transmission
    expect((await reader.take(17)).readBigUInt64BE(8)).toBe(9n);
    socket.destroy();
  }
});
