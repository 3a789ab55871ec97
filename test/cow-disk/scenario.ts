// Every operation of a store, one after the other, and what the store holds after each: run by a
// process that is killed somewhere in it, and by the test that knows what must be there then.
import { join } from 'node:path';
import { addon } from '../../src/cow-disk/native.js';
import { Store } from '../../src/cow-disk/store.js';
import { NbdClient } from '../blktap/nbd-client.js';

const PAGE = 4096;
const PAGES = 16;

type Operation = (store: Store, folder: string) => Promise<unknown>;

let sockets = 0;

/** One page: there or not, but never in part. */
const write =
  (disk: string, page: number, value: number): Operation =>
  async (store, folder) => {
    const opened = await store.openDisk(disk);
    const socketPath = join(folder, `nbd-${process.pid}-${sockets++}`);
    await opened.serve({ socketPath, exportName: 'disk' });
    const client = await NbdClient.connect(socketPath);
    await client.write(page * PAGE, Buffer.alloc(PAGE, value));
    await client.close();
    await opened.close();
  };
const snapshot =
  (disk: string, name: string): Operation =>
  (store) =>
    store.snapshot({ disk, name });
const clone =
  (disk: string, generation: string, name: string): Operation =>
  (store) =>
    store.clone({ disk, generation, name });
const drop =
  (disk: string, generation: string): Operation =>
  (store) =>
    store.removeGeneration({ disk, generation });
/** Changes nothing that anybody sees. */
const settled: Operation = (store) => store.settled();

export const operations: Operation[] = [
  (store) => store.createDisk({ name: 'web', size_bytes: PAGES * PAGE }),
  write('web', 0, 1),
  snapshot('web', 'one'),
  write('web', 1, 2),
  snapshot('web', 'two'),
  write('web', 2, 3),
  snapshot('web', 'three'),
  clone('web', 'three', 'test'),
  write('test', 3, 4),
  snapshot('test', 'own'),
  drop('web', 'one'),
  settled,
  drop('web', 'two'),
  settled,
  (store) => store.rollback({ disk: 'web', generation: 'three' }),
  write('web', 5, 6),
  (store) => store.commit({ disk: 'test', discard: true }),
  settled,
  snapshot('web', 'last'),
  clone('web', 'last', 'more'),
  (store) => store.removeDisk({ disk: 'web' }),
  settled,
];

/** All names, each with the first byte of all its pages. */
export async function stateOf(store: Store): Promise<Record<string, string>> {
  const state: Record<string, string> = {};
  const { disks, generations } = await store.list();
  const pagesOf = (provider: unknown) =>
    Array.from({ length: PAGES }, (_, page) => addon().readPage(provider, page)?.[0]).join(' ');
  for (const { id, disk, name } of generations) {
    const view = await store.openGeneration(disk, id);
    state[`${disk}@${name}`] = pagesOf(view.provider());
    view.close();
  }
  for (const { name } of disks) {
    // By a generation of its own, dropped again: reading it needs no server.
    const { id } = await store.snapshot({ disk: name });
    const view = await store.openGeneration(name, id);
    state[name] = pagesOf(view.provider());
    view.close();
    await store.removeGeneration({ disk: name, generation: id });
  }
  return state;
}

// STORE FOLDER: does all of it; a line on its output after each operation.
const [directory, folder] = process.argv.slice(2);
if (process.argv[1]?.endsWith('scenario.ts') && directory !== undefined && folder !== undefined) {
  const store = await Store.open(directory);
  for (const operation of operations) {
    await operation(store, folder);
    console.log('done');
  }
  await store.close();
}
