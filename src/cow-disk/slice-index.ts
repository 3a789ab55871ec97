import { loadAddon } from '../common/native.js';

/** The index of native/blktap/slice_index.h, for tests and benches; disks have their own inside. */
export interface NativeSliceIndex {
  /** `entry`: 0 base, 1 to 0xfffffffe a slice, 0xffffffff zeros. Pages beyond the end: E_ARGUMENT. */
  set(page: number, count: number, entry: number): void;
  get(page: number): number;
  /** Of one leaf: 64 aligned pages. */
  entries(page: number, count: number): number[];
  /** The page's entry, and a number of pages from it on that share it. */
  run(page: number): [entry: number, pages: number];
  baseRun(page: number): number;
  /** Shares all nodes. */
  copy(): NativeSliceIndex;
  drop(): void;
  /** Of all copies' nodes, shared ones once, with the allocator's overhead. */
  bytes(): number;
  /** Sets single pages anywhere, `writes` of them, by slices 1 to `slices` in turn. */
  scatter(writes: number, slices: number, seed: number): void;
  /** Nanoseconds a look-up of `run` pages takes, on average over a million of them. */
  lookupNs(run: number, seed: number): number;
}

interface Constructor {
  new (pages: number): NativeSliceIndex;
  race(pages: number, readers: number, copies: number, seed: number): number;
}

function native(): Constructor {
  return loadAddon<{ SliceIndex: Constructor }>('dataplane').SliceIndex;
}

export function sliceIndex(pages: number): NativeSliceIndex {
  return new (native())(pages);
}

/** Threads read copies while their owner changes them: the number of wrong answers. */
sliceIndex.race = (pages: number, readers: number, copies: number, seed: number): number =>
  native().race(pages, readers, copies, seed);

export interface IndexFootprint {
  pattern: string;
  /** Data that the index speaks of. */
  written_bytes: number;
  index_bytes: number;
  lookup_ns: number;
  lookup_8_pages_ns: number;
}

/** Bytes and look-up times of an index for 1 GiB of data, by pattern, over `slices` slices. */
export function measureSliceIndex(slices = 1000, seed = 1): IndexFootprint[] {
  const gib = 2 ** 18; // pages
  const measure = (pattern: string, pages: number, fill: (index: NativeSliceIndex) => void) => {
    const index = sliceIndex(pages);
    fill(index);
    return {
      pattern,
      written_bytes: 2 ** 30,
      index_bytes: index.bytes(),
      lookup_ns: index.lookupNs(1, seed),
      lookup_8_pages_ns: index.lookupNs(8, seed),
    };
  };
  const part = Math.floor(gib / slices);
  return [
    measure('in sequence, one slice', gib, (index) => index.set(0, gib, 1)),
    measure(`in sequence, ${slices} slices`, gib, (index) => {
      for (let i = 0; i < slices; i++) index.set(i * part, part, 1 + i);
    }),
    ...([8, 1024] as const).map((size) =>
      measure(`single pages of ${size} GiB, ${slices} slices`, size * gib, (index) =>
        index.scatter(gib, slices, seed),
      ),
    ),
    measure(`every page over again, ${slices} slices`, gib, (index) => {
      index.scatter(8 * gib, slices, seed);
    }),
  ];
}
