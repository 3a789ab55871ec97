/** What hosts hold together, against sets of pages. */
import fc from 'fast-check';
import { expect, it } from 'vitest';
import { coverage, type Holding, intersection } from '../../src/sfld/holdings.js';

const PAGES = 40;
const pages = fc.uniqueArray(fc.nat(PAGES - 1));

function runsOf(numbers: number[]): number[] {
  const runs: number[] = [];
  for (const page of [...numbers].sort((a, b) => a - b)) {
    const [first, count] = runs.slice(-2);
    if (first !== undefined && count !== undefined && first + count === page) {
      runs[runs.length - 1] = count + 1;
    } else {
      runs.push(page, 1);
    }
  }
  return runs;
}

function holding(absent: number[] | null): Holding {
  return { generation: '0'.repeat(32), absent: absent && runsOf(absent), port: 7448 };
}

const look = (needed: number[] | null, others: (number[] | null)[]) =>
  coverage(
    'ram',
    '0'.repeat(32),
    PAGES,
    needed && runsOf(needed),
    others.map((absent, i) => ({ host: `h${i}`, holding: holding(absent) })),
  );

it('intersection is that of sets', () => {
  fc.assert(
    fc.property(pages, pages, (a, b) => {
      const both = a.filter((page) => b.includes(page));
      expect(intersection(runsOf(a), runsOf(b))).toEqual(runsOf(both));
    }),
    { verbose: true },
  );
});

it('a page is held if one host lacks it not; hosts that lack too much to say are not counted upon', () => {
  fc.assert(
    fc.property(pages, fc.array(fc.option(pages), { maxLength: 5 }), (needed, others) => {
      const found = look(needed, others);
      const nowhere = needed.filter((page) =>
        others.every((absent) => absent === null || absent.includes(page)),
      );
      expect(found.needed_pages).toBe(needed.length);
      expect(found.unheld_pages).toBe(nowhere.length);
      const useful = others.flatMap((absent, i) =>
        absent !== null && needed.some((page) => !absent.includes(page)) ? [`h${i}`] : [],
      );
      expect(found.held_by.map(({ host }) => host)).toEqual(useful);
      for (const { host, all } of found.held_by) {
        const absent = others[Number(host.slice(1))];
        expect(all).toBe(needed.every((page) => !absent?.includes(page)));
      }
    }),
    { verbose: true },
  );
});

it('a replica that lacks too much to say needs a host that holds all', () => {
  expect(look(null, [[1, 2], null])).toMatchObject({ needed_pages: PAGES, unheld_pages: 2 });
  expect(look(null, [[1], []])).toMatchObject({ unheld_pages: 0 });
});
