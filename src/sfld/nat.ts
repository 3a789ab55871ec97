/**
 * The daemon's part in NAT gateways: the policy that host.json names is put in force at the start,
 * gateways follow the VMs that come and go, DNS names are asked again in time. Nothing waits for
 * it: a clone runs before its family's gateway is there, on a host where it is the first.
 *
 * Errors are logged and tried again with the next change or refresh; VMs go on.
 */
import { asSnowflockError } from '../common/errors.js';
import type { Logger } from '../common/log.js';
import { loadPolicy, NatHost, type NatHostOptions } from '../nat/gateway.js';
import type { NatPolicy } from '../nat/policy.js';
import type { NetbackFilter } from '../netback-filter/filter.js';
import { GATEWAY } from '../network/addresses.js';

const DNS_REFRESH_S = 60;

export interface NatKeeperOptions {
  /** Path of the policy. */
  file: string;
  filter: NetbackFilter;
  log: Logger;
  /** Of the families' root parents on this host. */
  nameOf: (family: number) => string | undefined;
  /** Default: where this process is. */
  place?: Pick<NatHostOptions, 'netns' | 'runDir' | 'resolver'>;
}

export class NatKeeper {
  readonly #policy: NatPolicy;
  readonly #nat: NatHost;
  readonly #log: Logger;
  #wanted: 'nothing' | 'sync' | 'refresh' | 'apply' = 'nothing';
  #work: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;
  #closed = false;

  /** E_CONFIG, E_IO: the policy. */
  constructor(options: NatKeeperOptions) {
    this.#policy = loadPolicy(options.file);
    const { filter, nameOf, place } = options;
    this.#nat = new NatHost({ filter, nameOf, ...place });
    this.#log = options.log;
  }

  /** What DHCP tells guests. */
  get lease(): { router: string; dns?: string[] } {
    const dns = this.#policy.dns_servers;
    return { router: GATEWAY, ...(dns === undefined ? {} : { dns }) };
  }

  /** Puts the policy in force, once the VMs of an earlier daemon are known again. */
  start(): void {
    this.#want('apply');
    const everyMs = (this.#policy.dns_refresh_s ?? DNS_REFRESH_S) * 1000;
    this.#timer = setInterval(() => this.#want('refresh'), everyMs);
    this.#timer.unref();
  }

  /** A VM has come or gone. */
  changed(): void {
    if (this.#timer !== undefined) this.#want('sync');
  }

  /** What is under way. */
  async settled(): Promise<void> {
    await this.#work;
  }

  /** Gateways go on, unless `remove` is set. */
  async close(remove: boolean): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
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
        if (what === 'sync') await this.#nat.sync();
        const failed =
          what === 'apply'
            ? (await this.#nat.apply(this.#policy)).failed
            : what === 'refresh'
              ? await this.#nat.refresh()
              : {};
        for (const [name, why] of Object.entries(failed)) {
          this.#log.warn({ name, why }, 'a name in the NAT policy cannot be resolved');
        }
      } catch (error) {
        const { code, message } = asSnowflockError(error);
        this.#log.error({ code }, `NAT gateways: ${message}`);
      }
    }
  }
}
