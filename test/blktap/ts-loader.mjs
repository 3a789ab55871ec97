// Lets a plain `node` child process run the sources: `node --import ./ts-loader.mjs child.ts`.
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readFile, rename, writeFile } from 'node:fs/promises';
import { register } from 'node:module';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isMainThread } from 'node:worker_threads';

const CACHE = fileURLToPath(new URL('../../node_modules/.cache/ts-loader', import.meta.url));

if (isMainThread) register(import.meta.url);

export async function resolve(specifier, context, next) {
  if (specifier.startsWith('.') && specifier.endsWith('.js') && context.parentURL) {
    const url = new URL(specifier.replace(/\.js$/, '.ts'), context.parentURL);
    if (existsSync(fileURLToPath(url))) return { url: url.href, shortCircuit: true };
  }
  return next(specifier, context);
}

export async function load(url, context, next) {
  if (!url.startsWith('file:') || !url.endsWith('.ts')) return next(url, context);
  return { format: 'module', source: await compiled(fileURLToPath(url)), shortCircuit: true };
}

/** Kept by what the source says: loading the compiler takes longer than most children live. */
async function compiled(path) {
  const text = await readFile(path, 'utf8');
  const kept = join(CACHE, createHash('sha256').update(text).digest('hex'));
  const found = await readFile(kept, 'utf8').catch(() => undefined);
  if (found !== undefined) return found;
  const { default: ts } = await import('typescript');
  const { outputText } = ts.transpileModule(text, {
    compilerOptions: { module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2023 },
  });
  await mkdir(CACHE, { recursive: true });
  const made = `${kept}.${process.pid}`;
  await writeFile(made, outputText);
  await rename(made, kept); // a child that is killed leaves nothing half made under that name
  return outputText;
}
