import { type Command, InvalidArgumentError, Option } from 'commander';
import {
  type CloneResult,
  type ForkRecord,
  type ReplicaSummary,
  SnowflockClient,
} from '../api/client.js';
import { exec } from '../api/exec.js';
import { asSnowflockError, SnowflockError } from '../common/errors.js';
import { parseRegions } from '../sfld/disjoint.js';
import { count as pagesIn } from '../sfld/holdings.js';
import { confirm } from './confirm.js';
import { ms, note, parseSize, printJson, table } from './output.js';

export const DEFAULT_RAM_BYTES = 512 * 2 ** 20;

interface RunOptions {
  image: string;
  memory?: number;
  vcpus: number;
  addressing: 'agent' | 'dhcp';
}

interface Globals {
  socket: string;
  json?: boolean;
}

export function count(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1 || value > 4096) {
    throw new InvalidArgumentError('must be a whole number from 1 to 4096.');
  }
  return value;
}

export function size(text: string): number {
  const bytes = parseSize(text);
  if (bytes === undefined || bytes < 64 * 2 ** 20 || bytes % 2 ** 20 !== 0) {
    throw new InvalidArgumentError('must be at least 64 MiB, in whole MiB (e.g. 512, 4G).');
  }
  return bytes;
}

function seconds(text: string): number {
  const value = Number(text);
  if (!Number.isFinite(value) || value < 0 || value > 86_400) {
    throw new InvalidArgumentError('must be a number of seconds from 0 to 86400.');
  }
  return value;
}

export function addVmCommands(program: Command): void {
  const context = (): { client: SnowflockClient; json: boolean } => {
    const { socket, json } = program.opts<Globals>();
    return { client: new SnowflockClient(socket), json: json === true };
  };

  program
    .command('run')
    .description('boot a VM and wait until its guest answers')
    .argument('<name>', 'name of the new VM')
    .option('--image <name>', 'image to boot', 'minimal')
    .option('--memory <size>', 'RAM, in MiB unless a unit is given (default: 512)', size)
    .option('--vcpus <n>', 'virtual CPUs', count, 1)
    .addOption(
      new Option(
        '--addressing <who>',
        'what gives the guest its address; dhcp needs no agent in it',
      )
        .choices(['agent', 'dhcp'])
        .default('agent'),
    )
    .action(async (name: string, o: RunOptions) => {
      const { client, json } = context();
      const vm = await client.run({
        name,
        image: o.image,
        ram_bytes: o.memory ?? DEFAULT_RAM_BYTES,
        vcpus: o.vcpus,
        addressing: o.addressing,
      });
      if (json) printJson(vm);
      else process.stdout.write(`${vm.id}\n`);
    });

  program
    .command('ps')
    .description('list the VMs of all hosts')
    .action(async () => {
      const { client, json } = context();
      const { vms, unreachable } = await client.list();
      for (const one of unreachable) note(`no answer from host ${one.host}: ${one.message}`);
      if (json) {
        printJson(vms);
        return;
      }
      const rows = vms.map((vm) => [
        vm.id,
        vm.name,
        vm.host,
        vm.state,
        vm.vmid,
        vm.ip,
        vm.ram_bytes / 2 ** 20,
        vm.vcpus,
        Math.round((Date.now() - vm.created_ms) / 1000),
      ]);
      const header = ['id', 'name', 'host', 'state', 'vmid', 'ip', 'mib', 'vcpus', 'age s'];
      process.stdout.write(`${table(header, rows)}\n`);
    });

  program
    .command('replicas')
    .description('list what hosts hold of the memory and disks their clones were forked from')
    .action(async () => {
      const { client, json } = context();
      const { replicas, unreachable } = await client.replicas();
      for (const one of unreachable) note(`no answer from host ${one.host}: ${one.message}`);
      if (json) {
        printJson(replicas);
        return;
      }
      const header = [
        'generation',
        'kind',
        'host',
        'clones',
        'held',
        'of mib',
        'source',
        'without it',
      ];
      const rows = replicas.map((one) => [
        one.generation,
        one.kind,
        one.host,
        one.vms.length,
        one.complete ? 'all' : `${Math.floor((100 * one.held_pages) / one.pages)}%`,
        Math.ceil((one.pages * 4096) / 2 ** 20),
        `${one.source.host} ${one.source.state}`,
        withoutSource(one),
      ]);
      process.stdout.write(`${table(header, rows)}\n`);
    });

  program
    .command('fork')
    .description('fork a running VM; fewer clones than asked may be granted')
    .argument('<vm>', 'id or name of the parent (on this host)')
    .option('-n, --clones <n>', 'how many clones', count, 1)
    .option('--ticket <ticket>', 'use this ticket instead of requesting one')
    .action(async (vm: string, o: { clones: number; ticket?: string }) => {
      const { client, json } = context();
      let ticket = o.ticket;
      if (ticket === undefined) {
        const granted = await client.requestTicket(vm, o.clones);
        ticket = granted.ticket;
        if (granted.granted < o.clones) note(`granted ${granted.granted} of ${o.clones} clones`);
      }
      report(await client.clone(vm, ticket), json);
    });

  program
    .command('disjoint')
    .description('name what each clone will need a part of its own of: it is not multicast')
    .argument('<vm>', 'id or name of the parent (on this host)')
    .option('--disk <regions...>', 'of its disk, as OFFSET+BYTES')
    .option('--ram <regions...>', 'of its memory, likewise')
    .addHelpText(
      'after',
      '\nFor forks from now on, in place of what was named before; without options: nothing.',
    )
    .action(async (vm: string, o: { disk?: string[]; ram?: string[] }) => {
      const { client, json } = context();
      const regions = (words: string[] = []) => parseRegions(words.join(','));
      const runs = await client.setDisjoint(vm, { ram: regions(o.ram), disk: regions(o.disk) });
      if (json) printJson(runs);
      else note(`${pagesIn(runs.ram)} pages of memory, ${pagesIn(runs.disk)} of the disk`);
    });

  program
    .command('ticket')
    .description('reserve room for clones of a VM')
    .argument('<vm>', 'id or name of the parent (on this host)')
    .option('-n, --clones <n>', 'how many clones', count, 1)
    .action(async (vm: string, o: { clones: number }) => {
      const { client, json } = context();
      const ticket = await client.requestTicket(vm, o.clones);
      if (json) printJson(ticket);
      else process.stdout.write(`${ticket.ticket}\n`);
    });

  program
    .command('join')
    .description('wait until all clones of a fork have ended')
    .argument('<vm>', 'id or name of the parent')
    .argument('<fork>', 'the fork or its ticket')
    .option('--timeout <seconds>', 'give up after', seconds, 3600)
    .action(async (vm: string, fork: string, o: { timeout: number }) => {
      const { client, json } = context();
      const clones = await client.join(vm, fork, o.timeout * 1000);
      if (json) printJson(clones);
      else process.stdout.write(`${table(['vmid', 'host', 'ended', 'message'], ends(clones))}\n`);
      if (clones.some((clone) => clone.end?.status !== 0)) process.exitCode = 1;
    });

  program
    .command('kill')
    .description('end a VM; its clones end with it')
    .argument('<vm>', 'id or name of a VM on any host')
    .option('--yes', 'do not ask')
    .action(async (vm: string, o: { yes?: boolean }) => {
      const { client } = context();
      await confirm(`End VM ${vm} and all its clones?`, o.yes);
      await client.kill(vm);
      note(`ended ${vm}`);
    });

  program
    .command('exec')
    .description("run a program in a VM's guest; its exit status becomes this command's")
    .argument('<vm>', 'id or name of a VM on any host')
    .argument('<command...>', 'program and arguments')
    .passThroughOptions()
    .action(async (vm: string, words: string[]) => {
      const { client } = context();
      // `exec VM -- ls -l` and `exec VM ls -l` are the same.
      const argv = words[0] === '--' ? words.slice(1) : words;
      if (argv.length === 0) throw new SnowflockError('E_ARGUMENT', 'exec needs a command');
      const child = await exec(client, vm, argv);
      process.stdin.pipe(child.stdin);
      child.stdout.pipe(process.stdout);
      child.stderr.pipe(process.stderr);
      process.on('SIGINT', () => child.signal('SIGINT'));
      process.on('SIGTERM', () => child.signal('SIGTERM'));
      const { status, signal } = await child.exited.finally(() => process.stdin.destroy());
      process.exitCode = status ?? 128 + (signal ?? 0);
    });

  program
    .command('console')
    .description("connect to a VM's serial console; leave with Ctrl-]")
    .argument('<vm>', 'id or name of a VM on any host')
    .action(async (vm: string) => {
      const { client } = context();
      const stream = await client.session(vm, 'console');
      const tty = process.stdin.isTTY;
      if (tty) process.stdin.setRawMode(true);
      note(`console of ${vm}: leave with Ctrl-]`);
      const closed = new Promise<void>((resolve, reject) => {
        stream.once('close', () => resolve());
        stream.once('error', (error) => reject(asSnowflockError(error, 'E_DAEMON')));
      });
      process.stdin.on('data', (data: Buffer) => {
        if (tty && data.includes(0x1d)) stream.destroy();
        else stream.write(data);
      });
      process.stdin.on('end', () => stream.destroy());
      stream.pipe(process.stdout);
      try {
        await closed;
      } finally {
        if (tty) process.stdin.setRawMode(false);
        process.stdin.destroy();
      }
    });
}

/** How the clones over a replica live on without its source, as far as anybody had to look. */
function withoutSource(one: ReplicaSummary): string {
  if (one.complete || one.needed_pages === 0) return 'needs nothing';
  if (one.unheld_pages === null) return '-';
  if (one.unheld_pages > 0) return `${one.unheld_pages} pages are nowhere`;
  return `from ${one.held_by.join(', ')}`;
}

function report(fork: ForkRecord, json: boolean): void {
  if (json) {
    printJson(fork);
  } else {
    const rows = fork.clones.map((clone) => [
      clone.vmid,
      clone.vm,
      clone.host,
      clone.ip,
      ms(clone.running_ms),
      clone.error === null ? 'running' : `${clone.error.code}: ${clone.error.message}`,
    ]);
    process.stdout.write(`${fork.id}\n`);
    note(
      `parent paused for ${ms(fork.parent_pause_ms)}, descriptor ${fork.descriptor_bytes} bytes`,
    );
    process.stdout.write(`${table(['vmid', 'id', 'host', 'ip', 'after', 'state'], rows)}\n`);
  }
  if (fork.clones.some((clone) => !clone.ok)) process.exitCode = 11;
}

function ends(clones: CloneResult[]): (string | number)[][] {
  return clones.map((clone) => [
    clone.vmid,
    clone.host,
    clone.end === null ? '-' : (clone.end.status ?? clone.end.reason),
    clone.end?.message ?? '',
  ]);
}
