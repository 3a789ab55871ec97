import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';

// The set-up itself, in a project made for it: nothing to install, builds that take no time.
const scripts = fileURLToPath(new URL('../../scripts', import.meta.url));
let root = '';
const children: ChildProcess[] = [];

function write(path: string, content: string): void {
  mkdirSync(join(root, path, '..'), { recursive: true });
  writeFileSync(join(root, path), content);
}

function project(buildNative: string): void {
  const scriptsOf = {
    'build:native': `echo full >> built && mkdir -p build/Release && ${buildNative}`,
    'build:native:changed': `echo changed >> built && ${buildNative}`,
    'build:ts': 'mkdir -p dist/src && cp src/main.ts dist/src/main.js',
  };
  write('package.json', JSON.stringify({ name: 'x', version: '1.0.0', scripts: scriptsOf }));
}

beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'sf-setup-'));
  cpSync(scripts, join(root, 'scripts'), { recursive: true });
  write('package-lock.json', '{"packages": {}}');
  write('node_modules/.package-lock.json', '{"packages": {}}');
  write('native/a.cc', 'int a;');
  write('src/main.ts', '');
  project('cp native/a.cc build/Release/a.node');
});
afterEach(async () => {
  for (const child of children.splice(0)) {
    if (child.exitCode !== null || child.signalCode !== null) continue;
    child.kill('SIGKILL');
    await once(child, 'exit');
  }
  rmSync(root, { recursive: true, force: true });
});

function start(...args: string[]) {
  const child = spawn(process.execPath, [join(root, 'scripts/setup.mjs'), ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  children.push(child);
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (part) => {
    stdout += part;
  });
  child.stderr.on('data', (part) => {
    stderr += part;
  });
  const ended = once(child, 'close').then(([status]) => ({
    status: status as number | null,
    stdout,
    stderr,
  }));
  return { child, ended };
}

describe('set-up', () => {
  it('does what is missing, says so, and does it once', async () => {
    const first = await start().ended;
    expect(first).toMatchObject({ status: 0, stderr: '' });
    expect(first.stdout).toMatch(
      /^setup: native build: not built yet\nsetup: native build: done in .*\nsetup: TypeScript build: not built yet\nsetup: TypeScript build: done in .*\nsetup: done in .* s\n$/,
    );
    expect(await start().ended).toEqual({ status: 0, stdout: '', stderr: '' });
    const third = await start('-v').ended;
    expect(third.stdout).toContain('setup: native build: ok, up to date\n');
    expect(readFileSync(join(root, 'built'), 'utf8')).toBe('full\n');
  });

  it('builds what changed, and removes what has no source any more', async () => {
    write('src/old.ts', '');
    write('dist/src/old.js', '');
    expect((await start('--quiet').ended).stdout).toBe('');
    expect(existsSync(join(root, 'dist/src/old.js'))).toBe(true);
    rmSync(join(root, 'src/old.ts'));
    write('native/a.cc', 'int b;');
    expect((await start('--quiet').ended).status).toBe(0);
    expect(readFileSync(join(root, 'built'), 'utf8')).toBe('full\nchanged\n');
    expect(readFileSync(join(root, 'build/Release/a.node'), 'utf8')).toBe('int b;');
    expect(existsSync(join(root, 'dist/src/old.js'))).toBe(false);
  });

  it('says what failed, shows why, and what to run by hand', async () => {
    project('echo a.cc:1: no such thing >&2; exit 7');
    const failed = await start().ended;
    expect(failed.status).toBe(1);
    expect(failed.stderr).toContain('  | a.cc:1: no such thing\n');
    expect(failed.stderr).toMatch(
      /setup: native build: npm failed \(exit status 7\)\n {2}by hand: npm run build:native\n$/,
    );
    project('cp native/a.cc build/Release/a.node');
    expect((await start().ended).status).toBe(0);
  });

  it('can be interrupted, and goes on the next time', async () => {
    project('echo up > started; exec sleep 1000');
    const { child, ended } = start();
    await expect.poll(() => existsSync(join(root, 'started')), { timeout: 60_000 }).toBe(true);
    child.kill('SIGINT');
    expect(await ended).toMatchObject({
      status: 130,
      stderr: 'setup: interrupted; run it again to go on\n',
    });
    project('cp native/a.cc build/Release/a.node');
    expect((await start().ended).stdout).toContain('native build: not built yet');
  });

  it('waits for another one in the same folder', async () => {
    project('cp native/a.cc build/Release/a.node; echo up > started; cat go');
    const { status } = await new Promise<{ status: number | null }>((resolve) => {
      const child = spawn('mkfifo', [join(root, 'go')]);
      child.on('close', (code) => resolve({ status: code }));
    });
    expect(status).toBe(0);
    const first = start();
    await expect.poll(() => existsSync(join(root, 'started')), { timeout: 60_000 }).toBe(true);
    const second = start();
    const [line] = (await once(second.child.stdout, 'data')) as [Buffer];
    expect(line.toString()).toBe(
      'setup: another set-up of this folder is running, waiting for it\n',
    );
    writeFileSync(join(root, 'go'), '');
    expect((await first.ended).status).toBe(0);
    expect((await second.ended).status).toBe(0);
    expect(readFileSync(join(root, 'built'), 'utf8')).toBe('full\n');
  });

  it('refuses options it does not know', async () => {
    const refused = await start('--fast').ended;
    expect(refused.status).toBe(1);
    expect(refused.stderr).toContain('unknown option --fast');
  });
});
