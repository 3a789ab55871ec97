import { isIPv4 } from 'node:net';
import { networkInterfaces } from 'node:os';
import { type Command, InvalidArgumentError } from 'commander';
import { SnowflockError } from '../common/errors.js';
import { type Explanation, explain, type Flow } from '../nat/explain.js';
import { loadPolicy, NatHost, type NatView } from '../nat/gateway.js';
import { dnsNames, type NatPolicy, policyOf } from '../nat/policy.js';
import { type Resolved, refresh } from '../nat/resolve.js';
import { FAMILY_MAX, vmidOfAddress } from '../network/addresses.js';
import { confirm } from './confirm.js';
import { note, printJson, table } from './output.js';
import { onUplink } from './uplink.js';

/** Exit status of `explain` for a flow that is refused. */
const REFUSED = 1;

interface Uplink {
  uplink: string;
  hostName?: string;
}

function onHost<T>(options: Uplink, work: (nat: NatHost) => Promise<T>): Promise<T> {
  const { hostName } = options;
  return onUplink(options.uplink, (filter) =>
    work(new NatHost({ filter, ...(hostName !== undefined && { hostName }) })),
  );
}

/** What is to be known of a policy with a router; '' without one. */
function routing({ router, host_name: self }: Pick<NatView, 'router' | 'host_name'>): string {
  if (router === null) return '';
  return router === self
    ? `this host (${self}) is the router for all hosts`
    : `host ${router} is the router: gateways are there, and none on this host (${self})`;
}

function warn(failed: Record<string, string>): void {
  for (const [name, why] of Object.entries(failed)) {
    note(`${name}: ${why}; it allows what else it has or had before, or nothing`);
  }
}

function show(view: NatView): void {
  const rows = [
    ...view.gateways.flatMap(({ family, counters }) =>
      Object.entries(counters).map(([name, it]) => [family, name, it.packets, it.bytes]),
    ),
    ...Object.entries(view.host).map(([name, it]) => ['host', name, it.packets, it.bytes]),
  ].filter((row) => row[2] !== 0);
  const gateways = view.gateways.map((it) => [
    it.family,
    it.namespace,
    it.address,
    it.parent_here ? 'here' : '-',
    it.connections,
  ]);
  if (!view.applied) note('no policy is in force; `snowflock nat apply FILE` puts one in force');
  if (view.router !== null) note(routing(view));
  const header = ['family', 'namespace', 'address', 'parent', 'connections'];
  process.stdout.write(`${table(header, gateways)}\n`);
  if (rows.length === 0) return;
  process.stdout.write(`\n${table(['family', 'counter', 'packets', 'bytes'], rows)}\n`);
}

/** `ADDRESS[:PORT]`, `NAME[:PORT]`. */
function endpoint(text: string): { host: string; port: number } {
  const [, host = '', port = '0'] = /^([^:]+)(?::(\d{1,5}))?$/.exec(text) ?? [];
  if (host === '' || Number(port) > 65535) {
    throw new SnowflockError('E_ARGUMENT', `${text} is neither ADDRESS nor ADDRESS:PORT`);
  }
  return { host, port: Number(port) };
}

/** By number, by its root parent's name, or both. */
interface Family {
  number?: number;
  name?: string;
}

interface ExplainOptions extends Uplink {
  family?: Family;
  protocol: Flow['protocol'];
  file?: string;
}

interface Known {
  policy: NatPolicy;
  resolved: Resolved;
  /** By family number: names of root parents, as far as they are known. */
  names: Record<string, string>;
  /** With the parent here or not; undefined where only a file is known. */
  families?: Map<number, boolean>;
  /** Another host that is the router. */
  router?: string;
}

async function known(options: ExplainOptions): Promise<Known> {
  if (options.file !== undefined) {
    const policy = loadPolicy(options.file);
    const allowPrivate = policy.dns_private === true;
    const now = { keepMs: 0, nowMs: Date.now(), allowPrivate };
    const { resolved, failed } = await refresh(dnsNames(policy), {}, now);
    warn(failed);
    return { policy, resolved, names: {} };
  }
  return await onHost(options, async (nat) => {
    const state = await nat.policy();
    if (state === undefined) {
      throw new SnowflockError(
        'E_STATE',
        'no policy is in force; apply one, or name one to look at with --file',
      );
    }
    const { gateways, router, host_name: self } = await nat.view();
    const here = gateways.map((it): [number, boolean] => [it.family, it.parent_here]);
    if (router === null || router === self) return { ...state, families: new Map(here) };
    const guests = nat.localFamilies().map((family): [number, boolean] => [family, false]);
    return { ...state, families: new Map(guests), router };
  });
}

/** Those that are known here, in the order of their numbers, then those of which the policy has a name. */
function familiesOf(policy: NatPolicy, names: Known['names'], here: readonly number[]): Family[] {
  const keys = Object.keys(policy.families ?? {});
  const listed = keys.filter((key) => /^\d+$/.test(key)).map(Number);
  const numbers = new Set([...here, ...listed, ...Object.keys(names).map(Number)]);
  const known = Object.values(names);
  return [
    ...[...numbers]
      .sort((a, b) => a - b)
      .map((number) => ({ number, ...(names[number] !== undefined && { name: names[number] }) })),
    ...keys.filter((key) => !/^\d+$/.test(key) && !known.includes(key)).map((name) => ({ name })),
  ];
}

async function explainFlow(source: string, destination: string, options: ExplainOptions) {
  const { policy, resolved, names, families, router } = await known(options);
  const to = endpoint(destination);
  const inward = to.host === 'host';
  if (!isIPv4(source) || (!inward && vmidOfAddress(source) === undefined)) {
    const what = inward ? 'an IPv4 address' : "a guest's address in 10.86.0.0/16";
    throw new SnowflockError('E_ARGUMENT', `SRC is ${what}, not ${source}`);
  }
  const { protocol } = options;
  if ((protocol === 'icmp') !== (to.port === 0)) {
    throw new SnowflockError('E_ARGUMENT', 'TCP and UDP need a port (DST:PORT), ICMP has none');
  }
  const all = familiesOf(policy, names, [...(families?.keys() ?? [])]);
  const isHere = ({ number = -1 }: Family) => families?.get(number) === true;
  const ruleOf = ({ number = -1, name }: Family) => policyOf(policy, number, name);
  const byPort = all.filter((it) =>
    ruleOf(it).inbound?.some((r) => r.port === to.port && r.protocol === protocol),
  );
  // Of several families with one name the first has the ports (ruleset.ts).
  const only = inward
    ? [byPort.find(isHere) ?? byPort[0]]
    : all.filter(({ number = -1 }) => families?.has(number) === true);
  const { family: asked } = options;
  const [sole] = only.length === 1 ? only : [];
  const isAsked = ({ number, name }: Family) =>
    asked?.number === undefined ? name === asked?.name : number === asked.number;
  const family = asked === undefined ? sole : (all.find(isAsked) ?? asked);
  if (family === undefined && !inward) {
    throw new SnowflockError('E_ARGUMENT', 'which family? --family names it (see `nat show`)');
  }
  const hostAddresses = Object.values(networkInterfaces()).flatMap((all) =>
    (all ?? []).map(({ address }) => address),
  );
  const context = {
    policy: family === undefined ? {} : ruleOf(family),
    resolved,
    // Those of another host are not known here.
    hostAddresses: families === undefined || router !== undefined ? [] : hostAddresses,
    parentHere: families === undefined || (family !== undefined && isHere(family)),
    ...(router !== undefined && { router }),
  };
  const addresses =
    inward || isIPv4(to.host)
      ? [to.host]
      : Object.keys(resolved[to.host.toLowerCase()] ?? {}).slice(0, 1);
  const address = addresses[0];
  if (address === undefined) {
    throw new SnowflockError(
      'E_ARGUMENT',
      `${to.host} is no IPv4 address, and no name that leads anywhere by a rule`,
    );
  }
  const flow: Flow = {
    direction: inward ? 'in' : 'out',
    source,
    destination: address,
    protocol,
    port: to.port,
  };
  return { family: family?.number ?? null, ...flow, ...explain(flow, context) };
}

/** `snowflock nat`: the ways out of the isolated networks. No daemon is needed. */
export function addNatCommands(program: Command): void {
  const json = (): boolean => program.opts<{ json?: boolean }>().json === true;
  const nat = program
    .command('nat')
    .description('gateways from isolated networks to the outside, by a policy')
    .addHelpText(
      'after',
      `
FILE is a policy; docs/network.md describes it. Each family with a VM on this host gets a gateway of
its own; what no rule allows is refused and counted. Gateways and their state are in the kernel: they
go on when the command has ended. With a daemon, sfld does this for its VMs (\`nat\` in host.json).

Exit status: 0; of \`explain\` 1 for a flow that is refused; 2 an argument or policy that is wrong;
4 no filter on the uplink; 5 no policy in force, gateways on another uplink, or another process changes
them for too long; 16 the kernel or a command refused (the message says which).`,
    );
  const command = (name: string, description: string): Command =>
    nat
      .command(name)
      .description(description)
      .option('--uplink <interface>', 'interface that has the filter', 'eth0')
      .option(
        '--host-name <name>',
        'as the policy names this host, if it is the router (remembered; default: its hostname)',
      );

  command('apply', 'put a policy in force, at once, without cutting flows that it allows')
    .argument('<file>', 'the policy')
    .action(async (file: string, options: Uplink) => {
      const policy = loadPolicy(file);
      const { view, ...done } = await onHost(options, async (host) => ({
        ...(await host.apply(policy)),
        view: await host.view(),
      }));
      if (json()) return printJson(done);
      warn(done.failed);
      note(`in force; families with a gateway here: ${done.families.join(', ') || 'none'}`);
      if (view.router !== null) note(routing(view));
    });

  command('sync', 'gateways for the families that have VMs here now, none for others').action(
    async (options: Uplink) => {
      const families = await onHost(options, (host) => host.sync());
      if (json()) printJson({ families });
      else note(`families with a gateway here: ${families.join(', ') || 'none'}`);
    },
  );

  command('refresh', 'resolve the DNS names of rules again').action(async (options: Uplink) => {
    const failed = await onHost(options, (host) => host.refresh());
    if (json()) printJson({ failed });
    else warn(failed);
  });

  command('show', 'show gateways and what each rule counted').action(async (options: Uplink) => {
    const view = await onHost(options, (host) => host.view());
    if (json()) printJson(view);
    else show(view);
  });

  command('explain', 'say which rule decides about a flow, and why')
    .argument('<src>', "a guest's address; for `host:PORT` an address outside")
    .argument('<dst>', 'ADDRESS:PORT, NAME:PORT (a name of a rule), or host:PORT')
    .option('--family <which>', "of the guest: its number, or its root parent's name", (text) => {
      if (!/^\d+$/.test(text)) return { name: text };
      if (Number(text) > FAMILY_MAX) {
        throw new InvalidArgumentError(`numbers go from 0 to ${FAMILY_MAX}`);
      }
      return { number: Number(text) };
    })
    .option(
      '--protocol <name>',
      'tcp, udp or icmp',
      (text) => {
        if (text === 'tcp' || text === 'udp' || text === 'icmp') return text;
        throw new InvalidArgumentError('tcp, udp or icmp');
      },
      'tcp' as const,
    )
    .option('--file <policy>', 'look at this policy instead of the one in force')
    .action(async (source: string, destination: string, options: ExplainOptions) => {
      const found: Explanation = await explainFlow(source, destination, options);
      if (json()) printJson(found);
      else process.stdout.write(`${found.verdict}: ${found.why} (counter ${found.counter})\n`);
      if (found.verdict === 'refuse') process.exitCode = REFUSED;
    });

  command('rm', 'take all gateways of this host away, and the policy')
    .option('-y, --yes', 'do not ask')
    .action(async (options: Uplink & { yes?: boolean }) => {
      await confirm('Cut all families on this host off the outside?', options.yes);
      const families = await onHost(options, (host) => host.remove());
      if (json()) printJson({ families });
    });
}
