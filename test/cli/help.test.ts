import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { projectRoot } from '../../src/common/native.js';

/** Documents whose commands, links and file names are checked. */
const DOCUMENTS = [
  'README.md',
  'SPECIFICATION.md',
  'CHANGELOG.md',
  ...readdirSync(join(projectRoot, 'docs'))
    .filter((name) => name.endsWith('.md'))
    .map((name) => `docs/${name}`),
];
const read = (path: string) => readFileSync(join(projectRoot, path), 'utf8');

/** What a page of help says a command takes. */
interface Command {
  /** Long and short options; true: it takes a value. */
  options: Map<string, boolean>;
  positionals: { least: number; most: number };
  hasSubcommands: boolean;
}

/** docs/cli.md, which is made of all pages of help. */
const commands = new Map<string, Command>();
for (const section of read('docs/cli.md')
  .split(/^## (?=snowflock)/m)
  .slice(1)) {
  const name = section.slice(0, section.indexOf('\n'));
  const usage = /^Usage: (.*)$/m.exec(section)?.[1] ?? '';
  const options = new Map<string, boolean>();
  for (const [, short, long, value] of section.matchAll(
    /^ {2}(?:(-\w), )?(--[\w-]+)( <[^>]+>)?/gm,
  )) {
    for (const option of [short, long]) {
      // A command's own options come first, then the global ones.
      if (option !== undefined && !options.has(option)) options.set(option, value !== undefined);
    }
  }
  const words = usage.split(' ').filter((word) => /^[[<]/.test(word));
  const places = words.filter((word) => word !== '[options]' && word !== '[command]');
  commands.set(name, {
    options,
    positionals: {
      least: places.filter((place) => place.startsWith('<')).length,
      most: places.some((place) => place.includes('...'))
        ? Number.POSITIVE_INFINITY
        : places.length,
    },
    hasSubcommands: words.includes('[command]'),
  });
}

/** What is wrong with `snowflock ARGUMENTS`; `whole`: all positional arguments must be there. */
function faultOf(args: string[], whole: boolean): string | undefined {
  let name = 'snowflock';
  let places = 0;
  for (let i = 0; i < args.length; i++) {
    const command = commands.get(name);
    if (command === undefined) return `no command ${name}`;
    const word = args[i] ?? '';
    if (word === '--') {
      places += args.length - i - 1;
      break;
    }
    // What follows a program to run is the program's own.
    if (places > 1 && command.positionals.most === Number.POSITIVE_INFINITY) break;
    if (word.startsWith('-') && word !== '-') {
      const takesValue = command.options.get(word.split('=')[0] ?? '');
      if (takesValue === undefined) return `${name} has no option ${word}`;
      if (takesValue && !word.includes('=') && ++i >= args.length) return `${word} lacks its value`;
    } else if (command.hasSubcommands) {
      name = `${name} ${word}`;
      if (!commands.has(name)) return `no command ${name}`;
    } else {
      places++;
    }
  }
  const command = commands.get(name);
  if (command === undefined || !whole) return undefined;
  if (command.hasSubcommands) return `${name} lacks a subcommand`;
  const { least, most } = command.positionals;
  return places < least || places > most ? `${name} takes other arguments` : undefined;
}

const scripts = (JSON.parse(read('package.json')) as { scripts: Record<string, string> }).scripts;
const toolVerbs = [...read('guest/tool/sf.c').matchAll(/"? {2}sf ([a-z]+)|\| sf ([a-z]+)/g)].map(
  (match) => match[1] ?? match[2] ?? '',
);

/** What is wrong with one simple command of a document. */
function faultOfCommand(words: string[], whole: boolean): string | undefined {
  const [program, ...rest] = words[0] === 'sudo' ? words.slice(1) : words;
  if (program === 'snowflock') return faultOf(rest, whole);
  if (program === 'sf') {
    const verb = rest.find((word) => !word.startsWith('-'));
    return verb === undefined || toolVerbs.includes(verb) ? undefined : `sf has no ${verb}`;
  }
  if (program === 'node') {
    const file = rest.find((word) => !word.startsWith('-')) ?? '';
    return existsSync(join(projectRoot, sourceOf(file))) ? undefined : `no file ${file}`;
  }
  if (program !== 'npm') return undefined;
  const run = rest[0] === 'run' ? rest[1] : rest[0] === 'test' ? 'test' : undefined;
  if (run === undefined) {
    return ['link', 'ci'].includes(rest[0] ?? '') ? undefined : `npm ${rest[0]}?`;
  }
  if (scripts[run] === undefined) return `package.json has no script ${run}`;
  const separator = rest.indexOf('--');
  const args = separator < 0 ? [] : rest.slice(separator + 1);
  if (run === 'demo') return faultOf(['demo', ...args], whole);
  if (run === 'bench') {
    const [name] = args;
    const known =
      name === undefined || name === 'NAME' || existsSync(join(projectRoot, `bench/${name}.ts`));
    if (!known) return `no bench ${name}`;
    const wrong = args.find((word) => /^\[?--/.test(word) && !/^\[?--(json|quick)\]?$/.test(word));
    return wrong === undefined ? undefined : `bench has no option ${wrong}`;
  }
  return undefined;
}

/** The source of a file that the TypeScript build makes; any other path as it is. */
function sourceOf(path: string): string {
  return path.replace(/^(?:\.\.\/)?dist\/(.*)\.js$/, '$1.ts');
}

/** True if there is such a file; `*` stands for any part of its name. */
function exists(path: string): boolean {
  const folder = join(projectRoot, dirname(path));
  if (!path.includes('*')) return existsSync(join(projectRoot, path));
  const parts = basename(path).split('*');
  const [first = '', last = ''] = [parts[0], parts.at(-1)];
  return (
    existsSync(folder) &&
    readdirSync(folder).some((name) => name.startsWith(first) && name.endsWith(last))
  );
}

/** The simple commands of a shell script, without what surrounds them. */
function shellCommands(script: string): string[][] {
  return script
    .replaceAll('\\\n', ' ')
    .split(/\n|&&|\|\||[|;()]/)
    .map((line) =>
      line
        .replace(/#.*$/, '')
        .trim()
        .replace(/^(?:then|else|do|if) /, '')
        .split(/\s+/)
        .filter((word) => word !== ''),
    )
    .filter((words) => words.length > 0);
}

const fences = (text: string) => [...text.matchAll(/^```(\w*)\n(.*?)^```$/gms)];
const prose = (text: string) => text.replaceAll(/^```.*?^```$/gms, '');

describe('docs/cli.md', () => {
  it('is what --help says', () => {
    const { status, stderr } = spawnSync(process.execPath, ['scripts/cli-doc.mjs', '--check'], {
      cwd: projectRoot,
      encoding: 'utf8',
    });
    expect(`${stderr}${status}`).toBe('0');
  });

  it('is understood by this test', () => {
    expect([...commands.keys()]).toContain('snowflock image build');
    expect(faultOf(['fork', 'vm', '--clones', '4'], true)).toBeUndefined();
    expect(faultOf(['--json', 'exec', 'vm', '--', 'ls', '-l'], true)).toBeUndefined();
    expect(faultOf(['exec', 'vm', 'ls', '-l'], true)).toBeUndefined();
    expect(faultOf(['fork', 'vm', '--copies', '4'], true)).toMatch(/no option --copies/);
    expect(faultOf(['fork', 'vm', '--clones'], true)).toMatch(/lacks its value/);
    expect(faultOf(['image', 'remove'], true)).toMatch(/no command/);
    expect(faultOf(['kill', '--yes'], true)).toMatch(/other arguments/);
    expect(toolVerbs).toEqual(expect.arrayContaining(['ticket', 'clone', 'join', 'kill', 'ip']));
  });
});

describe.each(DOCUMENTS)('%s', (path) => {
  const text = read(path);

  it('names commands and options that exist', () => {
    const wrong: string[] = [];
    const check = (words: string[], whole: boolean): void => {
      const fault = faultOfCommand(words, whole);
      if (fault !== undefined) wrong.push(`${words.join(' ')}: ${fault}`);
    };
    for (const [, language, script] of fences(text)) {
      if (language === 'sh') for (const words of shellCommands(script ?? '')) check(words, true);
    }
    for (const [, code = ''] of prose(text).matchAll(/`([^`]+)`/g)) {
      if (/^(sudo )?(snowflock|npm|node|sf) /.test(code)) check(code.split(/\s+/), false);
    }
    expect(wrong).toEqual([]);
  });

  it('links to files that exist', () => {
    const links = [...prose(text).matchAll(/\]\(([^)\s]+)\)/g)].map((match) => match[1] ?? '');
    const missing = links
      .filter((link) => !/^(https?:|#)/.test(link))
      .filter((link) => !existsSync(join(projectRoot, dirname(path), link.replace(/#.*$/, ''))));
    expect(missing).toEqual([]);
  });

  it('names files of the project that exist', () => {
    const folders =
      /^(src|docs|test|bench|scripts|native|kernel|guest|bindings|examples|packages|xen)\//;
    const missing = [...prose(text).matchAll(/`([^`\s]+)`/g)]
      .map((match) => match[1] ?? '')
      .filter((name) => folders.test(name) && !exists(name));
    expect(missing).toEqual([]);
  });
});
