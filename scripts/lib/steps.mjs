// The steps of set-up, in order. Each knows why it must run (`reason`) and how (`run`).
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { listsAreOld, missingPackages, wantedPackages } from './debian.mjs';
import { npmReason } from './npm.mjs';
import { asRoot, StepError } from './run.mjs';
import { filesUnder, hashOf, staleReason, writeStamp } from './stamp.mjs';

/**
 * @typedef {(argv: readonly string[], byHand: string, env?: NodeJS.ProcessEnv) => Promise<void>} Run
 * @typedef {object} Step
 * @property {string} title
 * @property {() => string | undefined} reason why it must run; undefined: it is done already
 * @property {boolean} [asksItself] it is always run, finds out itself what there is to do, and is
 *   mentioned only when that takes a while
 * @property {(run: Run) => Promise<void>} run
 */

/**
 * @param {string} root
 * @returns {Step[]}
 */
export function steps(root) {
  return [debianPackages(), npmPackages(root), native(root), typescript(root), image(root)];
}

/** @returns {Step} */
function debianPackages() {
  const wanted = Object.keys(wantedPackages());
  return {
    title: 'Debian packages',
    reason() {
      const missing = missingPackages(wanted);
      if (!missing) {
        throw new StepError(
          'this is not Debian or a relative of it (no dpkg)',
          `install what scripts/packages.json lists: ${wanted.join(' ')}`,
        );
      }
      if (missing.length === 0) return undefined;
      return `${missing.length} missing (${missing.join(' ')})`;
    },
    async run(run) {
      const missing = missingPackages(wanted) ?? [];
      const install = ['apt-get', 'install', '-y', '--no-install-recommends', ...missing];
      const byHand = `sudo apt-get update && sudo ${install.join(' ')}`;
      const env = { DEBIAN_FRONTEND: 'noninteractive' };
      const privileged = (/** @type {string[]} */ argv) => {
        const command = asRoot(argv, ['DEBIAN_FRONTEND']);
        if (!command) throw new StepError('installing packages needs root or sudo', byHand);
        return run(command, byHand, env);
      };
      const fresh = !listsAreOld();
      if (!fresh) await privileged(['apt-get', 'update']);
      // Completes what an interrupted run left; otherwise it does nothing.
      await privileged(['dpkg', '--configure', '-a']);
      try {
        await privileged(install);
      } catch (error) {
        // Lists of today may still name versions the mirror has replaced since.
        if (!fresh || !(error instanceof StepError)) throw error;
        await privileged(['apt-get', 'update']);
        await privileged(install);
      }
    },
  };
}

/** @param {string} root @returns {Step} */
function npmPackages(root) {
  return {
    title: 'npm packages',
    reason: () => npmReason(root),
    run: (run) => run(['npm', 'ci', '--no-audit', '--no-fund'], 'npm ci'),
  };
}

const NATIVE_STAMP = 'build/snowflock-native.json';

/**
 * Addons, the agent QEMU loads, eBPF objects: all targets of binding.gyp.
 * @param {string} root
 * @returns {Step}
 */
function native(root) {
  const builders = filesUnder(root, ['scripts']).filter((path) =>
    /\/(native-sources|[a-z]+-build)\.mjs$/.test(path),
  );
  const inputs = ['native', 'kernel', 'binding.gyp', ...builders];
  const versions = () => {
    const addonApi = join(root, 'node_modules/node-addon-api/package.json');
    return [
      process.version,
      process.arch,
      existsSync(addonApi) ? JSON.parse(readFileSync(addonApi, 'utf8')).version : 'none',
    ].join(' ');
  };
  const hash = () => hashOf(root, inputs, [versions()]);
  const made = join(root, 'build/snowflock-versions');
  return {
    title: 'native build',
    reason: () => staleReason(root, NATIVE_STAMP, hash()),
    async run(run) {
      const sources = hash();
      // Removed first: a build cut short must not pass for a whole one.
      rmSync(join(root, NATIVE_STAMP), { force: true });
      // make knows what depends on what, but not that another Node.js needs all of it anew.
      const same = existsSync(made) && readFileSync(made, 'utf8') === versions();
      const script = same ? 'build:native:changed' : 'build:native';
      await run(['npm', 'run', script], 'npm run build:native');
      writeFileSync(made, versions());
      const products = readdirSync(join(root, 'build/Release'))
        .filter((name) => /\.(node|so|bpf\.o)$/.test(name))
        .map((name) => `build/Release/${name}`);
      writeStamp(root, NATIVE_STAMP, sources, products);
    },
  };
}

const TS_STAMP = 'dist/snowflock-ts.json';

/** @param {string} root @returns {Step} */
function typescript(root) {
  const inputs = ['src', 'bench', 'tsconfig.json', 'tsconfig.build.json', 'package-lock.json'];
  const hash = () => hashOf(root, inputs);
  return {
    title: 'TypeScript build',
    reason: () => staleReason(root, TS_STAMP, hash()),
    async run(run) {
      const sources = hash();
      rmSync(join(root, TS_STAMP), { force: true });
      await run(['npm', 'run', 'build:ts'], 'npm run build:ts');
      const products = filesUnder(root, ['dist/src', 'dist/bench']).filter((product) => {
        if (!product.endsWith('.js')) return false;
        const source = product.replace(/^dist\//, '').replace(/\.js$/, '.ts');
        if (existsSync(join(root, source))) return true;
        // Of a source that is gone: it must not be imported by chance.
        rmSync(join(root, product));
        rmSync(join(root, `${product}.map`), { force: true });
        return false;
      });
      writeStamp(root, TS_STAMP, sources, products);
    },
  };
}

/** @param {string} root @returns {Step} */
function image(root) {
  return {
    title: 'guest image',
    asksItself: true,
    reason: () => (existsSync(join(root, 'src/cli/main.ts')) ? 'checking it' : undefined),
    async run(run) {
      const command = [process.execPath, 'dist/src/cli/main.js', 'image', 'build', 'minimal'];
      const byHand = 'npm run build && sudo node dist/src/cli/main.js image build minimal';
      const privileged = asRoot(command);
      if (!privileged) throw new StepError('building the image needs root or sudo', byHand);
      try {
        await run(privileged, byHand);
      } catch (error) {
        // It fetches packages, which apt's lists must know.
        const update = asRoot(['apt-get', 'update']);
        if (!(error instanceof StepError) || !listsAreOld() || !update) throw error;
        await run(update, 'sudo apt-get update');
        await run(privileged, byHand);
      }
    },
  };
}
