// Lets a plain `node` child process run the sources: `node --import ./ts-loader.mjs child.ts`. What
// it makes of a file is kept, by the file's content, for the next process.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readFile, rename, writeFile } from 'node:fs/promises';
import { register } from 'node:module';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isMainThread } from 'node:worker_threads';

if (isMainThread) register(import.meta.url);

const options = { module: 'ESNext', target: 'ES2023' };
const kept = fileURLToPath(new URL('../../node_modules/.cache/ts-loader', import.meta.url));

export async function resolve(specifier, context, next) {
  if (specifier.startsWith('.') && specifier.endsWith('.js') && context.parentURL) {
    const url = new URL(specifier.replace(/\.js$/, '.ts'), context.parentURL);
    if (existsSync(fileURLToPath(url))) return { url: url.href, shortCircuit: true };
  }
  return next(specifier, context);
}

async function transpiled(text) {
  const path = join(
    kept,
    `${createHash('sha256')
      .update(JSON.stringify(options) + text)
      .digest('hex')}.mjs`,
  );
  try {
    return await readFile(path, 'utf8');
  } catch {
    // Not made yet.
  }
  const { default: ts } = await import('typescript');
  const { outputText } = ts.transpileModule(text, { compilerOptions: options });
  await mkdir(kept, { recursive: true });
  const fresh = `${path}.${process.pid}`;
  await writeFile(fresh, outputText);
  await rename(fresh, path);
  return outputText;
}

export async function load(url, context, next) {
  if (!url.startsWith('file:') || !url.endsWith('.ts')) return next(url, context);
  const source = await transpiled(await readFile(fileURLToPath(url), 'utf8'));
  return { format: 'module', source, shortCircuit: true };
}
