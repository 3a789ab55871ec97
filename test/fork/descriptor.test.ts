import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import { Lab, sh } from './lab.js';

interface Case {
  title: string;
  code: string;
  vms: string[];
  free: number;
}

describe('a descriptor that is not what was announced', () => {
  let lab: Lab;
  let vm: string;

  beforeAll(async () => {
    lab = await Lab.start(2);
    vm = await lab.parent('parent', 128);
  });
  afterAll(() => lab?.destroy());

  it('is refused with a stable code, and what was made ready for it is removed', async () => {
    const [first, second] = [lab.daemon(0).host, lab.daemon(1).host];
    const folder = join(first.dirs.state, 'vms');
    const [record = ''] = readdirSync(folder);
    const script = join(projectRoot, 'test/fork/as-peer.mjs');
    const ran = await lab.testbed.execIn(
      second,
      [process.execPath, script, second.configPath, join(folder, record)],
      { timeoutMs: 60_000 },
    );
    expect(ran.stderr).toBe('');
    const cases = ran.stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as Case);
    expect(cases.map(({ title, code }) => [title, code])).toEqual([
      ['cut short', 'E_DESCRIPTOR'],
      ['half of it', 'E_DESCRIPTOR'],
      ['altered', 'E_DESCRIPTOR'],
      ['too long', 'E_DESCRIPTOR'],
      ['of another memory size', 'E_SHAPE'],
      ['of another generation', 'E_SHAPE'],
    ]);
    for (const { vms } of cases) expect(vms).toEqual(['parent']);
    // Nothing stays reserved, and nothing is left of the replicas.
    expect(new Set(cases.map(({ free }) => free)).size).toBe(1);
    for (const kind of [first.dirs.ram, first.dirs.state]) {
      expect(readdirSync(join(kind, 'replica'))).toEqual([]);
    }
    expect(await sh(lab.client, vm, 'echo alive')).toBe('alive');
  });
});
