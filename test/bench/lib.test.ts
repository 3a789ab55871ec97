import { describe, expect, it } from 'vitest';
import { summarize } from '../../bench/lib/stats.js';
import { figure, formatTable, ratio, spread } from '../../bench/lib/table.js';

describe('bench figures', () => {
  it('are summarized by median, ends and 95th percentile', () => {
    expect(summarize([4, 1, 3, 2])).toEqual({
      count: 4,
      median: 2.5,
      min: 1,
      max: 4,
      p95: 3.8499999999999996,
      mean: 2.5,
    });
    expect(() => summarize([])).toThrow(RangeError);
    expect(() => summarize([1, Number.NaN])).toThrow(RangeError);
  });

  it('are written with three digits that count', () => {
    expect([0, 0.1234, 5.678, 12.34, 999.5, 1234567].map(figure)).toEqual([
      '0.00',
      '0.12',
      '5.68',
      '12.3',
      '1 000',
      '1 234 567',
    ]);
    expect(spread(summarize([1, 2, 3]))).toBe('2.00 (1.00–3.00)');
    expect([ratio(6, 2), ratio(2, 2), ratio(1, 0)]).toEqual(['3.00×', '1×', '–']);
  });

  it('stand in columns', () => {
    expect(
      formatTable({
        title: 'T',
        columns: ['what', 'ms'],
        rows: [
          ['fork', 5],
          ['boot', 1234],
        ],
      }),
    ).toBe('T\nwhat     ms\n────  ─────\nfork   5.00\nboot  1 234');
  });
});
