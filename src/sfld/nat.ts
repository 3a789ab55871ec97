/**
 * The daemon's part in NAT gateways: the policy that host.json names is put in force at the start,
 * gateways follow the VMs that come and go, DNS names are asked again in time. Nothing waits for
 * it: a clone runs before its family's gateway is there, on a host where it is the first.
 *
 * Where the policy names one host as the router for all, that one asks the others which families they
 * have: when one of them says that this has changed, and every ROUTER_POLL_S besides.
 *
 * Errors are logged and tried again with the next change or refresh; VMs go on.
 */
import { asSnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { loadPolicy, NatHost, type NatHostOptions } from '../nat/gateway.js';
import type { NatPolicy } from '../nat/policy.js';
import type { NetbackFilter } from '../netback-filter/filter.js';
import { GATEWAY } from '../network/addresses.js';
import { FamiliesElsewhere } from './nat-families.js';
import type { HostPort } from './peers.js';

const DNS_REFRESH_S = 60;
const ROUTER_POLL_S = 10;

export interface NatKeeperOptions {
  /** Path of the policy. */
  file: string;
  filter: NetbackFilter;
  log: Logger;
  /** Of the families' root parents on this host. */
  nameOf: (family: number) => string | undefined;
  /** This host's name in the cluster, and the other hosts. Absent: this host is alone. */
  cluster?: { name: string; others: () => readonly HostPort[] };
  /** Default: where this process is. */
  place?: Pick<NatHostOptions, 'netns' | 'runDir' | 'resolver'>;
}

export class NatKeeper {
  readonly #policy: NatPolicy;
  readonly #nat: NatHost;
  readonly #log: Logger;
  readonly #cluster: NatKeeperOptions['cluster'];
  readonly #elsewhere: FamiliesElsewhere;
  #wanted: 'nothing' | 'sync' | 'refresh' | 'apply' = 'nothing';
  /** The other hosts' families may be others now; the router is to hear of this host's. */
  #ask = false;
  #tell = false;
  #silent = '';
  #work: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #poll: NodeJS.Timeout | undefined;
  #closed = false;

  /** E_CONFIG: the policy, or its router is no host of the cluster. E_IO. */
  constructor(options: NatKeeperOptions) {
    this.#policy = loadPolicy(options.file);
    const { filter, nameOf, cluster, place } = options;
    this.#cluster = cluster;
    this.#elsewhere = new FamiliesElsewhere(cluster?.others ?? (() => []));
    this.#nat = new NatHost({
      filter,
      nameOf,
      elsewhere: () => this.#elsewhere.all,
      ...(cluster !== undefined && { hostName: cluster.name }),
      ...place,
    });
    this.#log = options.log;
  }

  /** What DHCP tells guests. */
  get lease(): { router: string; dns?: string[] } {
    const dns = this.#policy.dns_servers;
    return { router: GATEWAY, ...(dns === undefined ? {} : { dns }) };
  }

  /** Puts the policy in force, once the VMs of an earlier daemon are known again. */
  start(): void {
    const { router } = this.#policy;
    const hosts = [this.#cluster?.name, ...(this.#cluster?.others() ?? []).map((it) => it.name)];
    if (router !== undefined && !hosts.includes(router)) {
      const known = hosts.join(', ');
      this.#log.error({ router, known }, 'the NAT policy names a router that is no host here');
    }
    this.#ask = true;
    this.#tell = true;
    this.#want('apply');
    this.#poll = setInterval(() => this.familiesChanged(), ROUTER_POLL_S * 1000);
    this.#poll.unref();
    const everyMs = (this.#policy.dns_refresh_s ?? DNS_REFRESH_S) * 1000;
    this.#timer = setInterval(() => this.#want('refresh'), everyMs);
    this.#timer.unref();
  }

  /** A VM has come or gone. */
  changed(): void {
    if (this.#timer === undefined) return;
    this.#tell = true;
    this.#want('sync');
  }

  /** Another host says that its families are others now. */
  familiesChanged(): void {
    if (this.#timer === undefined) return;
    this.#ask = true;
    this.#want('sync');
  }

  /** What is under way. */
  async settled(): Promise<void> {
    await this.#work;
  }

  /** Gateways go on, unless `remove` is set. */
  async close(remove: boolean): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
    clearInterval(this.#poll);
    await this.#work;
    if (remove) await this.#nat.remove();
  }

  #want(what: 'sync' | 'refresh' | 'apply'): void {
    if (this.#closed) return;
    const order = ['nothing', 'sync', 'refresh', 'apply'] as const;
    if (order.indexOf(what) > order.indexOf(this.#wanted)) this.#wanted = what;
    this.#work ??= this.#run().finally(() => {
      this.#work = undefined;
    });
  }

  async #run(): Promise<void> {
    while (this.#wanted !== 'nothing') {
      const what = this.#wanted;
      this.#wanted = 'nothing';
      try {
        const before = await this.#nat.policy();
        const { router } = what === 'apply' ? this.#policy : (before?.policy ?? {});
        if (what === 'apply') this.#elsewhere.remember(before?.elsewhere ?? []);
        const isRouter = router !== undefined && router === this.#cluster?.name;
        if (isRouter && this.#ask) await this.#askOthers();
        else if (what === 'sync' && !this.#tell) continue; // a poll, and no router
        if (what === 'sync') await this.#nat.sync();
        const failed =
          what === 'apply'
            ? (await this.#nat.apply(this.#policy)).failed
            : what === 'refresh'
              ? await this.#nat.refresh()
              : {};
        for (const [name, why] of Object.entries(failed)) {
          this.#log.warn(
            { name, why },
            'a name in the NAT policy does not lead where it says, or nowhere',
          );
        }
        if (this.#tell && router !== undefined && !isRouter) await this.#tellRouter(router);
        this.#tell = false;
      } catch (error) {
        const { code, message } = asSnowflockError(error);
        this.#log.error({ code }, `NAT gateways: ${message}`);
      }
    }
  }

  async #askOthers(): Promise<void> {
    this.#ask = false;
    const silent = (await this.#elsewhere.ask()).sort().join(', ');
    if (silent !== this.#silent && silent !== '') {
      this.#log.warn({ hosts: silent }, 'no answer: their families keep the gateways they have');
    }
    this.#silent = silent;
  }

  /** If it does not hear, it asks by itself soon. */
  async #tellRouter(router: string): Promise<void> {
    const port = this.#cluster?.others().find((it) => it.name === router);
    await port?.familiesChanged().catch((error: unknown) => {
      this.#log.warn({ router, error: String(error) }, 'the router does not answer');
    });
  }
}
