import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { projectRoot } from '../common/native.js';
import { run } from '../common/run.js';

const folders = {
  agent: 'guest/agent',
  init: 'guest/init',
  tool: 'guest/tool',
  linkwatch: 'guest/linkwatch',
} as const;
export const guestFolders = ['guest', 'bindings/c', 'examples'] as const;

/** All files the image takes from this project, sorted, as [path, content]. */
export async function guestSources(): Promise<[string, Buffer][]> {
  const files: [string, Buffer][] = [];
  for (const folder of guestFolders) {
    const root = join(projectRoot, folder);
    for (const entry of await readdir(root, { recursive: true, withFileTypes: true })) {
      if (!entry.isFile()) continue;
      const path = join(entry.parentPath, entry.name);
      files.push([path.slice(projectRoot.length + 1), await readFile(path)]);
    }
  }
  return files.sort(([a], [b]) => (a < b ? -1 : 1));
}

// Static and small: after a fork every page of a program that runs is fetched over the network.
const CFLAGS = [
  ...['-std=gnu17', '-D_GNU_SOURCE', '-Os', '-Wall', '-Wextra', '-Werror'],
  ...['-ffunction-sections', '-fdata-sections', '-fno-asynchronous-unwind-tables'],
  `-ffile-prefix-map=${projectRoot}=.`,
];
const STATIC = ['-static', '-s', '-Wl,--gc-sections', '-Wl,-z,norelro', '-Wl,--build-id=none'];
// musl has no kernel headers of its own; the system's are behind its own.
const KERNEL_HEADERS = [
  '-idirafter',
  '/usr/include',
  '-idirafter',
  '/usr/include/x86_64-linux-gnu',
];

async function sources(folder: string): Promise<string[]> {
  const names = (await readdir(join(projectRoot, folder))).filter((name) => name.endsWith('.c'));
  return names.sort().map((name) => join(projectRoot, folder, name));
}

/** Compiles the guest's own programs (static, musl) and the library into `out`. */
export async function compilePrograms(out: string, signal?: AbortSignal): Promise<void> {
  const binding = join(projectRoot, 'bindings/c');
  const library = join(binding, 'snowflock.c');
  const compile = (name: string, files: readonly string[], extra: readonly string[] = []) =>
    run(
      'musl-gcc',
      [...CFLAGS, ...STATIC, ...extra, ...KERNEL_HEADERS, '-o', join(out, name), ...files],
      { signal },
    );
  await compile('sf-agent', await sources(folders.agent));
  await compile('initrd', await sources(folders.init));
  await compile('sf-linkwatch', await sources(folders.linkwatch));
  await compile('sf', [...(await sources(folders.tool)), library], ['-I', binding]);
  for (const source of await sources('examples')) {
    const name = source.slice(source.lastIndexOf('/') + 1, -'.c'.length);
    await compile(name, [source, library], ['-I', binding]);
  }
  const object = join(out, 'snowflock.o');
  await run('gcc', [...CFLAGS, '-fPIC', '-c', '-o', object, library], { signal });
  await run('ar', ['rcsD', join(out, 'libsnowflock.a'), object], { signal });
  await run(
    'gcc',
    ['-shared', '-s', '-Wl,--build-id=none', '-Wl,-soname,libsnowflock.so.0', '-o'].concat(
      join(out, 'libsnowflock.so.0'),
      object,
    ),
    { signal },
  );
}

/** Versions of the compilers, for the image's hash. */
export async function compilerVersions(signal?: AbortSignal): Promise<string> {
  const { stdout } = await run('gcc', ['--version'], { signal });
  const musl = await run('dpkg-query', ['-W', 'musl-dev', 'musl-tools', 'linux-libc-dev'], {
    signal,
  });
  return `${stdout.split('\n')[0]}\n${musl.stdout}`;
}
