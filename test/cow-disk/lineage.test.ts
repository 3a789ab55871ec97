import { expect, test } from 'vitest';
import { type LineageNode, lineage, originOf } from '../../src/cow-disk/lineage.js';
import type { DiskEntry, GenerationEntry } from '../../src/cow-disk/store-api.js';

function disk(name: string, parent: string | null): DiskEntry {
  return {
    name,
    parent,
    size_bytes: 4096,
    created_ms: 0,
    base: { kind: 'none' },
    depth: 1,
    open: false,
    exports: [],
  };
}

function generation(
  id: string,
  of: string,
  parent: string | null,
  created_ms = 0,
): GenerationEntry {
  return { id, name: id, disk: of, parent, created_ms, size_bytes: 4096 };
}

const names = (nodes: LineageNode[]): unknown[] =>
  nodes.map((node) => [
    node.kind === 'disk' ? node.disk.name : `@${node.generation.id}`,
    ...names(node.children),
  ]);

test('a clone is below the generation of another disk that it stands on', () => {
  const listing = {
    directory: '/s',
    disks: [disk('web', 'g2'), disk('copy', 'c1'), disk('alone', null)],
    generations: [
      generation('g2', 'web', 'g1', 2),
      generation('g1', 'web', null, 1),
      generation('c1', 'copy', 'g1', 3),
    ],
  };
  expect(names(lineage(listing))).toEqual([
    ['web', ['@g1', ['copy', ['@c1']]], ['@g2']],
    ['alone'],
  ]);
  const [, copy] = listing.disks;
  expect(copy && originOf(listing, copy)?.id).toBe('g1');
});

test('generations of a removed disk and disks on each other are all shown, once', () => {
  const listing = {
    directory: '/s',
    disks: [disk('a', 'b1'), disk('b', 'a1')],
    generations: [
      generation('a1', 'a', null),
      generation('b1', 'b', null),
      generation('x1', 'gone', null),
    ],
  };
  expect(
    JSON.stringify(names(lineage(listing)))
      .match(/"[^"]+"/g)
      ?.sort(),
  ).toEqual(['"@a1"', '"@b1"', '"@x1"', '"a"', '"b"'].sort());
});
