import { mkdirSync, mkdtempSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  listsAreOld,
  missingFrom,
  missingPackages,
  wantedPackages,
} from '../../scripts/lib/debian.mjs';
import { npmReason } from '../../scripts/lib/npm.mjs';
import { compareVersions, unmetRequirements } from '../../scripts/lib/requirements.mjs';
import { hashOf, staleReason, writeStamp } from '../../scripts/lib/stamp.mjs';

let root = '';
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'sf-setup-'));
});
afterEach(() => rmSync(root, { recursive: true, force: true }));

function put(path: string, content: string | object = ''): void {
  mkdirSync(join(root, path, '..'), { recursive: true });
  writeFileSync(join(root, path), typeof content === 'string' ? content : JSON.stringify(content));
}

describe('Debian packages', () => {
  it('are missing when unknown, never installed, or removed but not purged', () => {
    const output = 'clang installed\nfio config-files\nkmod not-installed\n';
    expect(missingFrom(['clang', 'fio', 'kmod', 'lz4'], output)).toEqual(['fio', 'kmod', 'lz4']);
  });

  it('are asked of dpkg itself', () => {
    expect(missingPackages(['dpkg', 'no-such-package-at-all'])).toEqual(['no-such-package-at-all']);
  });

  it('each say what they are for', () => {
    for (const [name, purpose] of Object.entries(wantedPackages())) {
      expect(name).toMatch(/^[a-z0-9][a-z0-9+.-]+$/);
      expect(purpose.length).toBeGreaterThan(5);
    }
  });

  it('need fresh lists: none, or of days ago, will not do', () => {
    expect(listsAreOld(join(root, 'none'))).toBe(true);
    mkdirSync(join(root, 'lists'));
    expect(listsAreOld(join(root, 'lists'))).toBe(true);
    put('lists/deb.debian.org_debian_dists_bookworm_main_binary-amd64_Packages.lz4');
    expect(listsAreOld(join(root, 'lists'))).toBe(false);
    const threeDaysAgo = Date.now() / 1000 - 3 * 24 * 3600;
    utimesSync(join(root, 'lists'), threeDaysAgo, threeDaysAgo);
    expect(listsAreOld(join(root, 'lists'))).toBe(true);
  });
});

describe('npm packages', () => {
  const lock = {
    packages: {
      '': { version: '0.1.0' },
      'node_modules/a': { version: '1.0.0' },
      'node_modules/b': { version: '2.0.0', optional: true },
    },
  };

  it('are installed when nothing is, when one is missing, and when one is of another version', () => {
    put('package-lock.json', lock);
    expect(npmReason(root)).toBe('nothing is installed');
    put('node_modules/.package-lock.json', {
      packages: { 'node_modules/a': { version: '1.0.0' } },
    });
    expect(npmReason(root)).toBe('node_modules/a is missing');
    put('node_modules/a/package.json', '{}');
    expect(npmReason(root)).toBeUndefined();
    put('node_modules/.package-lock.json', {
      packages: { 'node_modules/a': { version: '0.9.0' } },
    });
    expect(npmReason(root)).toBe('node_modules/a is 0.9.0, not 1.0.0');
    put('node_modules/.package-lock.json', '{"packages": {"node_mod');
    expect(npmReason(root)).toBe('nothing is installed');
  });
});

describe('stamp', () => {
  it('follows contents and names, not times', () => {
    put('native/a.cc', 'int a;');
    const first = hashOf(root, ['native', 'kernel']);
    utimesSync(join(root, 'native/a.cc'), 1, 1);
    expect(hashOf(root, ['native', 'kernel'])).toBe(first);
    put('native/node_modules/x.cc', 'ignored');
    expect(hashOf(root, ['native', 'kernel'])).toBe(first);
    put('native/b.cc', '');
    expect(hashOf(root, ['native', 'kernel'])).not.toBe(first);
    expect(hashOf(root, ['native'], ['v20'])).not.toBe(hashOf(root, ['native'], ['v22']));
  });

  it('asks for a build when there is none, sources changed, or a product is gone', () => {
    expect(staleReason(root, 'build/stamp', 'h1')).toBe('not built yet');
    put('build/x.node');
    writeStamp(root, 'build/stamp', 'h1', ['build/x.node']);
    expect(staleReason(root, 'build/stamp', 'h1')).toBeUndefined();
    expect(staleReason(root, 'build/stamp', 'h2')).toBe('sources have changed');
    rmSync(join(root, 'build/x.node'));
    expect(staleReason(root, 'build/stamp', 'h1')).toBe('build/x.node is missing');
  });
});

describe('requirements', () => {
  const good = { platform: 'linux', arch: 'x64', kernel: '6.1.0-18-amd64', node: 'v20.19.0' };

  it('are compared as numbers', () => {
    expect(compareVersions('6.10.1', '6.9')).toBeGreaterThan(0);
    expect(compareVersions('v20.19.0', '20.19')).toBe(0);
    expect(compareVersions('5.15.0-91-generic', '6.1')).toBeLessThan(0);
  });

  it('name all that is unmet', () => {
    expect(unmetRequirements(good)).toEqual([]);
    const bad = { platform: 'linux', arch: 'arm64', kernel: '5.10.0', node: 'v18.20.0' };
    expect(unmetRequirements(bad)).toEqual([
      'needs Linux 6.1 or newer, this is 5.10.0 (Debian 12 has 6.1)',
      'needs an x86-64 processor, this is arm64',
      'needs Node.js 20.19 to 24, this is v18.20.0 (see https://nodejs.org)',
    ]);
    expect(unmetRequirements({ ...good, node: 'v25.0.0' })).toHaveLength(1);
  });
});
