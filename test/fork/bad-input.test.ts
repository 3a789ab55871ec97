import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { projectRoot } from '../../src/common/native.js';
import { startDaemonOn } from '../../src/testbed/daemons.js';
import { Lab, MIB, sh } from './lab.js';

describe('bad input', () => {
  let lab: Lab;
  let vm: string;

  beforeAll(async () => {
    lab = await Lab.start(2, { resources: { memory_bytes: 1024 * MIB } });
    vm = await lab.parent('parent', 256);
  });
  afterAll(() => lab?.destroy());

  const cli = (...args: string[]) => {
    const socket = join(lab.daemon(0).host.dirs.run, 'sfld.sock');
    const main = join(projectRoot, 'dist/src/cli/main.js');
    return spawnSync(process.execPath, [main, '--socket', socket, ...args], { encoding: 'utf8' });
  };

  it('an unknown image', () => {
    const { status, stderr, stdout } = cli('run', 'other', '--image', 'nosuch', '--memory', '128');
    expect(status).toBe(4);
    expect(stderr).toContain('E_IMAGE_UNKNOWN');
    expect(stdout).toBe('');
  });

  it('an unknown VM, a name that exists, no daemon', () => {
    expect(cli('exec', 'nosuch', '--', 'true')).toMatchObject({ status: 4 });
    expect(cli('run', 'parent', '--memory', '128')).toMatchObject({ status: 5 });
    expect(cli('--socket', '/nonexistent/sfld.sock', 'ps')).toMatchObject({ status: 6 });
  });

  it('a memory size that is none, and one that does not fit', () => {
    expect(cli('run', 'other', '--memory', '12x')).toMatchObject({ status: 2 });
    const tooMuch = cli('--json', 'run', 'other', '--memory', '4G');
    expect(tooMuch.status).toBe(8);
    expect(JSON.parse(tooMuch.stderr)).toMatchObject({ error: { code: 'E_CAPACITY' } });
  });

  it('a ticket used twice, of another VM, or unknown', async () => {
    const other = await lab.parent('other', 128);
    const ticket = await lab.client.requestTicket(vm, 1);
    await expect(lab.client.clone(other, ticket.ticket)).rejects.toMatchObject({
      code: 'E_TICKET_OWNER',
    });
    const fork = await lab.client.clone(vm, ticket.ticket);
    await expect(lab.client.clone(vm, ticket.ticket)).rejects.toMatchObject({
      code: 'E_TICKET_USED',
    });
    await expect(lab.client.clone(vm, 'f'.repeat(32))).rejects.toMatchObject({
      code: 'E_TICKET_UNKNOWN',
    });
    await lab.client.killClones(vm, { fork: fork.id });
    await lab.client.kill(other);
  });

  it('more clones than fit are granted in part, then not at all; nothing stays reserved', async () => {
    // 1024 MiB a host, the parent takes 256 of the first: seven clones of 256 MiB fit.
    const ticket = await lab.client.requestTicket(vm, 20);
    expect(ticket.granted).toBe(7);
    await expect(lab.client.requestTicket(vm, 1)).rejects.toMatchObject({ code: 'E_CAPACITY' });
    const fork = await lab.client.clone(vm, ticket.ticket);
    expect(fork.clones.filter((clone) => clone.ok).length).toBe(7);
    await lab.client.killClones(vm, { fork: fork.id });
    const again = await lab.client.requestTicket(vm, 7);
    expect(again.granted).toBe(7);
  });

  it('a second daemon on the same state', async () => {
    await expect(startDaemonOn(lab.testbed, lab.daemon(0).host)).rejects.toThrow('E_IN_USE');
    expect(await sh(lab.client, vm, 'echo alive')).toBe('alive');
  });

  it('the same from inside the guest, with the same codes', async () => {
    const unknown = await sh(lab.client, vm, 'sf clone 0123 2>&1 || true');
    expect(unknown).toContain('E_TICKET_UNKNOWN');
    const exit = await sh(lab.client, vm, 'sf exit 2>&1 || true');
    expect(exit).toContain('E_STATE');
    expect(await sh(lab.client, vm, 'sf --help >/dev/null; echo $?')).toBe('0');
  });
});
