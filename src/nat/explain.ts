/**
 * The policy as a pure function: which rule decides about a flow, and why. ruleset.ts says the same
 * to the kernel; test/nat compares the two with real traffic. Change both together.
 *
 * Left out: limits, which depend on what else goes on. A flow that is allowed here may be slowed or
 * refused by one; `show` counts that.
 */
import { ipNumber, NETWORK } from '../network/addresses.js';
import { type FamilyPolicy, parseBlock, parsePorts } from './policy.js';
import type { Resolved } from './resolve.js';

export interface Flow {
  /** `out`: begun by a guest. `in`: begun outside, to a port of the host. */
  direction: 'out' | 'in';
  source: string;
  /** Of an `in` flow the host itself; not looked at. */
  destination: string;
  protocol: 'tcp' | 'udp' | 'icmp';
  /** Destination port; 0 for ICMP. */
  port: number;
}

export interface Explanation {
  verdict: 'allow' | 'refuse';
  /** Of the policy, or null where none matched. */
  rule: string | null;
  /** Counter in `show` that counts it. */
  counter: string;
  why: string;
}

export interface ExplainContext {
  policy: FamilyPolicy;
  resolved: Resolved;
  /** IPv4 addresses of the host itself. */
  hostAddresses: readonly string[];
  /** Ports of this host lead to the parent: it runs here, or this host is the router. */
  parentHere: boolean;
  /** Another host that is the router. */
  router?: string;
}

/** The addresses that lead to gateways of families on a host: 100.86.0.0/16 (RFC 6598). */
export const LINK_NETWORK = '100.86.0.0/16';

const within = (block: string, address: number): boolean => {
  const range = parseBlock(block);
  return range !== undefined && address >= range.first && address <= range.last;
};

function matches(to: string, address: string, resolved: Resolved): string | undefined {
  if (parseBlock(to) !== undefined) return within(to, ipNumber(address)) ? to : undefined;
  return resolved[to.toLowerCase()]?.[address] === undefined ? undefined : `${to} (${address})`;
}

export function explain(flow: Flow, context: ExplainContext): Explanation {
  return flow.direction === 'out' ? explainOut(flow, context) : explainIn(flow, context);
}

function explainOut(flow: Flow, context: ExplainContext): Explanation {
  const { policy, resolved, hostAddresses } = context;
  const refuse = (counter: string, why: string, rule: string | null = null): Explanation => ({
    verdict: 'refuse',
    rule,
    counter,
    why,
  });
  const destination = ipNumber(flow.destination);
  const top = Math.floor(destination / 2 ** 24);
  if (top === 0 || top === 127 || top >= 224) {
    return refuse('filter', `${flow.destination} is no address of another machine`);
  }
  if (flow.destination === '10.86.0.1') {
    return flow.protocol === 'icmp'
      ? { verdict: 'allow', rule: null, counter: 'gateway-ping', why: 'the gateway answers pings' }
      : refuse('refused-gateway', 'the gateway itself offers nothing but ping');
  }
  if (within(`${NETWORK}/16`, destination)) {
    return refuse('filter', "the family's own network does not pass the gateway");
  }
  if (within(LINK_NETWORK, destination)) {
    return refuse('refused-links', `${LINK_NETWORK} leads to other families' gateways`);
  }
  for (const rule of policy.allow ?? []) {
    if (rule.protocol !== flow.protocol) continue;
    if (rule.ports !== undefined) {
      const inside = rule.ports.map(parsePorts).some(({ first, last }) => {
        return flow.port >= first && flow.port <= last;
      });
      if (!inside) continue;
    }
    for (const to of rule.to) {
      const what = matches(to, flow.destination, resolved);
      if (what === undefined) continue;
      if (hostAddresses.includes(flow.destination)) {
        const why = `rule ${rule.name} allows ${what}, but it is this host itself`;
        return refuse('refused-host', why, rule.name);
      }
      const why = `rule ${rule.name} allows ${flow.protocol} to ${what}`;
      return { verdict: 'allow', rule: rule.name, counter: `allow-${rule.name}`, why };
    }
  }
  return refuse('refused-outbound', 'no rule allows it');
}

function explainIn(flow: Flow, context: ExplainContext): Explanation {
  const refuse = (counter: string, why: string, rule: string | null = null): Explanation => ({
    verdict: 'refuse',
    rule,
    counter,
    why,
  });
  const rule = (context.policy.inbound ?? []).find(
    (it) => it.protocol === flow.protocol && it.port === flow.port,
  );
  if (rule === undefined)
    return refuse('host', 'no rule leads this port of the host to the parent');
  if (!context.parentHere) {
    const where =
      context.router === undefined
        ? 'the parent runs on another host'
        : `ports of host ${context.router}, which is the router, lead to the parent`;
    return refuse('host', where, rule.name);
  }
  const source = ipNumber(flow.source);
  if (rule.from !== undefined && !rule.from.some((block) => within(block, source))) {
    const why = `rule ${rule.name} is not for ${flow.source}`;
    return refuse('refused-inbound', why, rule.name);
  }
  const why = `rule ${rule.name} leads ${flow.protocol} port ${rule.port} to the parent`;
  return { verdict: 'allow', rule: rule.name, counter: `inbound-${rule.name}`, why };
}
