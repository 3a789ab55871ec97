import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import type { DemoResult } from '../../src/demo/result.js';

it('the demo forks a VM; every clone works, reports and exits; the answer is right', () => {
  const folder = mkdtempSync(join(tmpdir(), 'sf-demo-'));
  try {
    const file = join(folder, 'result.json');
    const main = join(projectRoot, 'dist/src/cli/main.js');
    const args = ['demo', '--clones', '3', '--hosts', '2', '--memory', '256', '--json', file];
    const ran = spawnSync(process.execPath, [main, ...args], { encoding: 'utf8' });
    expect(ran.stderr + ran.stdout).toContain('the same as without clones');
    const result = JSON.parse(readFileSync(file, 'utf8')) as DemoResult;
    expect(result.results.map(({ vmid, ok }) => [vmid, ok])).toEqual([
      [1, true],
      [2, true],
      [3, true],
    ]);
    expect(result.answer_ok).toBe(true);
    expect(result.wire_bytes_sent).toBeGreaterThan(0);
    expect(ran.status).toBe(0);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});
