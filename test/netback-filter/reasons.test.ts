import { expect, test } from 'vitest';
import { REASONS } from '../../src/netback-filter/reasons.js';
import { netback } from '../../src/network/native.js';

test('TypeScript and the kernel number the reasons alike', () => {
  expect(REASONS.map((reason) => reason.name)).toEqual(netback().reasonNames);
});
