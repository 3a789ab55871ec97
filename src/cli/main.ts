#!/usr/bin/env node
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
/** The command line: one file per group of commands, this one only joins them. */
import { Command, InvalidArgumentError } from 'commander';
import { SnowflockError } from '../common/errors.js';
import { projectRoot } from '../common/native.js';
import { addClusterCommands } from './cluster.js';
import { addDemoCommand } from './demo.js';
import { addDhcpCommand } from './dhcp.js';
import { addDiskCommands } from './disk.js';
import { addImageCommands } from './image.js';
import { addNatCommands } from './nat.js';
import { addNetCommands } from './net.js';
import { reportError } from './output.js';
import { addVmCommands } from './vm.js';

const { version } = JSON.parse(readFileSync(join(projectRoot, 'package.json'), 'utf8')) as {
  version: string;
};

const SOCKET = ['--socket <path>', "the local daemon's socket"] as const;
const JSON_OUTPUT = ['--json', 'data and errors as JSON'] as const;

/**
 * The options of every command are accepted before and after its name. Not as commander's global
 * options: `demo --json FILE` means another thing.
 */
function shareOptions(command: Command): void {
  for (const child of command.commands) {
    if (child.commands.length === 0 && child.name() !== 'demo') {
      // These need no daemon, and `disk serve --socket` is its own.
      if (!['disk', 'net', 'nat'].includes(command.name())) child.option(...SOCKET);
      child.option(...JSON_OUTPUT);
    }
    shareOptions(child);
  }
}

/** Known before any argument is found wrong. */
const jsonErrors = /(^| )--json( |$)/.test(process.argv.join(' ').split(' -- ')[0] ?? '');

const program = new Command('snowflock')
  .configureOutput({
    writeErr: (text) => {
      if (!jsonErrors) process.stderr.write(text);
    },
  })
  .description('fork() for virtual machines: one running VM becomes many, on many hosts')
  .version(version)
  .option(...SOCKET, process.env.SNOWFLOCK_SOCKET || '/run/snowflock/sfld.sock')
  .option(...JSON_OUTPUT)
  .enablePositionalOptions()
  .showHelpAfterError('(see --help)')
  .exitOverride()
  .hook('preAction', (_program, command) => {
    if (command.name() === 'demo') return;
    const { socket, json } = command.opts<{ socket?: string; json?: boolean }>();
    if (socket !== undefined && command.parent?.name() !== 'disk')
      program.setOptionValue('socket', socket);
    if (json === true) program.setOptionValue('json', true);
  });

addVmCommands(program);
addImageCommands(program);
addClusterCommands(program);
addDiskCommands(program);
addNetCommands(program);
addDhcpCommand(program);
addNatCommands(program);
addDemoCommand(program);
shareOptions(program);

// Who read the output may go (`| head`): what is under way, a `disk serve` above all, goes on.
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error;
  });
}

try {
  await program.parseAsync();
} catch (error) {
  const known = error as { code?: unknown; exitCode?: unknown };
  if (typeof known.code === 'string' && known.code.startsWith('commander.')) {
    // Help and version end with 0; wrong usage with 2, as E_ARGUMENT does.
    process.exitCode = known.exitCode === 0 ? 0 : 2;
    if (process.exitCode !== 0 && jsonErrors) {
      const message = String((error as Error).message).replace(/^error: /, '');
      reportError(new SnowflockError('E_ARGUMENT', message), true);
    }
  } else if (error instanceof InvalidArgumentError) {
    process.exitCode = 2;
  } else {
    process.exitCode = reportError(error, program.opts<{ json?: boolean }>().json === true);
  }
}
