import { closeSync, readFileSync } from 'node:fs';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { inNetns, openTap } from '../../src/network/tap.js';
import { Lab } from '../netback-filter/lab.js';

let lab: Lab;
beforeAll(async () => {
  lab = await Lab.create(1);
});
afterAll(() => lab?.destroy());

test('a tap is up, has its MTU and no IPv6, and goes with its descriptor', () => {
  const { netns } = lab.host(0);
  const fd = netns.do(() => openTap('tap0', { mtu: 1400 }));
  const shown = () => netns.exec('ip', '-o', 'link', 'show');
  expect(shown()).toMatch(/tap0: <[^>]*\bUP\b[^>]*> mtu 1400 /);
  const disabled = netns.do(() =>
    readFileSync('/proc/sys/net/ipv6/conf/tap0/disable_ipv6', 'utf8'),
  );
  expect(disabled).toBe('1\n');
  expect(() => netns.do(() => openTap('tap0'))).toThrow(
    expect.objectContaining({ code: 'E_EXISTS' }),
  );
  closeSync(fd);
  expect(shown()).not.toContain('tap0');
});

test('bad names, MTUs and namespaces are refused and leave no tap', () => {
  const { netns } = lab.host(0);
  for (const name of ['', '../x', 'a b', 'sixteen-letters1', 'tap%d']) {
    expect(() => netns.do(() => openTap(name))).toThrow(
      expect.objectContaining({ code: 'E_ARGUMENT' }),
    );
  }
  expect(() => netns.do(() => openTap('tap1', { mtu: 10 }))).toThrow(
    expect.objectContaining({ code: 'E_NETWORK' }),
  );
  expect(netns.exec('ip', '-o', 'link', 'show')).not.toContain('tap1');
  expect(() => inNetns('/run/netns/sf-none', () => 0)).toThrow(
    expect.objectContaining({ code: 'E_NETWORK' }),
  );
});

test('work in another namespace that throws comes back to this one', () => {
  const here = readFileSync('/proc/net/dev', 'utf8').split('\n').length;
  expect(() =>
    lab.host(0).netns.do(() => {
      throw new Error('from inside');
    }),
  ).toThrow('from inside');
  expect(readFileSync('/proc/net/dev', 'utf8').split('\n').length).toBe(here);
});
