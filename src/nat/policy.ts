/**
 * The NAT gateway's policy file (docs/network.md, NAT gateway): what a family may reach, who may
 * reach its parent, and limits. Refused: everything that no rule allows. Rules are asked in their
 * order, the first that matches decides.
 */
import { isIPv4 } from 'node:net';
import { type Static, Type } from 'typebox';
import { Value } from 'typebox/value';
import { SnowflockError } from '../common/errors.js';
import { FAMILY_MAX, ipNumber } from '../network/addresses.js';

const RULES_MAX = 1024;
const DESTINATIONS_MAX = 64;
const NAMES_MAX = 64;

/** Also part of the names of counters. */
const RuleName = Type.String({ pattern: '^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$' });
const Port = Type.Integer({ minimum: 1, maximum: 65535 });
const Protocol = Type.Union([Type.Literal('tcp'), Type.Literal('udp'), Type.Literal('icmp')]);
const strict = { additionalProperties: false };

const AllowRule = Type.Object(
  {
    name: RuleName,
    protocol: Protocol,
    /** IPv4 addresses, CIDR blocks, DNS names. */
    to: Type.Array(Type.String({ minLength: 1, maxLength: 253 }), {
      minItems: 1,
      maxItems: DESTINATIONS_MAX,
    }),
    /** Numbers and ranges, `"8000-8010"`. Absent: every port. */
    ports: Type.Optional(
      Type.Array(Type.Union([Port, Type.String({ pattern: '^[0-9]{1,5}-[0-9]{1,5}$' })]), {
        minItems: 1,
        maxItems: 64,
      }),
    ),
  },
  strict,
);
export type AllowRule = Static<typeof AllowRule>;

const InboundRule = Type.Object(
  {
    name: RuleName,
    protocol: Type.Union([Type.Literal('tcp'), Type.Literal('udp')]),
    /** Of the host. */
    port: Port,
    /** Of the parent; default: the same. */
    to_port: Type.Optional(Port),
    /** IPv4 addresses and CIDR blocks. Default: everybody. */
    from: Type.Optional(
      Type.Array(Type.String({ minLength: 1, maxLength: 18 }), {
        minItems: 1,
        maxItems: DESTINATIONS_MAX,
      }),
    ),
  },
  strict,
);
export type InboundRule = Static<typeof InboundRule>;

const Limits = Type.Object(
  {
    /** IPv4 bytes, in each direction. */
    bytes_per_s: Type.Optional(Type.Integer({ minimum: 1000, maximum: 1e10 })),
    /** In each direction. */
    packets_per_s: Type.Optional(Type.Integer({ minimum: 1, maximum: 1e8 })),
    new_connections_per_s: Type.Optional(Type.Integer({ minimum: 1, maximum: 1e6 })),
    /** At once; those that are over count until the kernel forgets them. */
    connections: Type.Optional(Type.Integer({ minimum: 1, maximum: 1e6 })),
  },
  strict,
);
export type Limits = Static<typeof Limits>;

const FamilyPolicy = Type.Object(
  {
    allow: Type.Optional(Type.Array(AllowRule, { maxItems: RULES_MAX })),
    inbound: Type.Optional(Type.Array(InboundRule, { maxItems: RULES_MAX })),
    per_clone: Type.Optional(Limits),
    per_family: Type.Optional(Limits),
  },
  strict,
);
export type FamilyPolicy = Static<typeof FamilyPolicy>;

export const NatPolicyFile = Type.Object(
  {
    version: Type.Literal(1),
    /** Given to guests by DHCP. They are reached only if a rule allows it. */
    dns_servers: Type.Optional(Type.Array(Type.String(), { maxItems: 3 })),
    /**
     * Name of the host that is the way out for all hosts, which have this policy too. Absent: each
     * host is its own.
     */
    router: Type.Optional(
      Type.String({ pattern: '^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$' }),
    ),
    /** DNS names of rules are asked again after so long. Default 60. */
    dns_refresh_s: Type.Optional(Type.Integer({ minimum: 5, maximum: 86_400 })),
    /** An address that a name no longer has stays allowed for so long. Default 3600. */
    dns_keep_s: Type.Optional(Type.Integer({ minimum: 0, maximum: 604_800 })),
    /** Names of rules may lead to addresses of private networks too (resolve.ts). Default false. */
    dns_private: Type.Optional(Type.Boolean()),
    /** Of families that `families` does not have. Absent: nothing is allowed. */
    default: Type.Optional(FamilyPolicy),
    /** By family number, or by the name of the root parent where a daemon knows it. */
    families: Type.Optional(Type.Record(Type.String({ maxLength: 63 }), FamilyPolicy)),
  },
  strict,
);
export type NatPolicy = Static<typeof NatPolicyFile>;

/** IPv4 addresses as numbers, both ends in it. */
export interface AddressRange {
  first: number;
  last: number;
}

/** Undefined if the text is neither an address nor a block (a.b.c.d/n with no bit below the mask). */
export function parseBlock(text: string): AddressRange | undefined {
  const [address = '', bits, ...rest] = text.split('/');
  if (!isIPv4(address) || rest.length > 0) return undefined;
  const first = ipNumber(address);
  if (bits === undefined) return { first, last: first };
  if (!/^\d{1,2}$/.test(bits) || Number(bits) > 32) return undefined;
  const size = 2 ** (32 - Number(bits));
  return first % size === 0 ? { first, last: first + size - 1 } : undefined;
}

export function parsePorts(port: number | string): { first: number; last: number } {
  const [first, last = first] = String(port).split('-').map(Number);
  return { first: first ?? 0, last: last ?? 0 };
}

const isDnsName = (text: string) =>
  /^(?=.*[a-z])([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*\.?$/i.test(
    text,
  );

/** All DNS names in the policy, in lower case, each once. */
export function dnsNames(policy: NatPolicy): string[] {
  const all = [policy.default, ...Object.values(policy.families ?? {})]
    .flatMap((family) => family?.allow ?? [])
    .flatMap((rule) => rule.to)
    .filter((to) => parseBlock(to) === undefined);
  return [...new Set(all.map((name) => name.toLowerCase()))];
}

/** Checks a parsed policy file. `source` names it in errors. E_CONFIG. */
export function parsePolicy(value: unknown, source: string): NatPolicy {
  const fail = (path: string, what: string): never => {
    throw new SnowflockError('E_CONFIG', `${source}: ${path || '/'}: ${what}`);
  };
  if (!Value.Check(NatPolicyFile, value)) {
    const faults = Value.Errors(NatPolicyFile, value);
    const extra = faults.find((fault) => fault.keyword === 'boolean');
    if (extra) return fail(extra.instancePath, 'unknown name');
    const fault = faults[0];
    if (fault?.keyword === 'required') {
      return fail(fault.instancePath, `${fault.params.requiredProperties.join(', ')} is missing`);
    }
    if (fault?.keyword === 'const') {
      return fail(fault.instancePath, `must be ${JSON.stringify(fault.params.allowedValue)}`);
    }
    return fail(fault?.instancePath ?? '', fault?.message ?? 'is not valid');
  }
  for (const [i, server] of (value.dns_servers ?? []).entries()) {
    if (!isIPv4(server)) fail(`/dns_servers/${i}`, `${server} is not an IPv4 address`);
  }
  if (value.default !== undefined) checkFamily(value.default, '/default', fail);
  if ((value.default?.inbound ?? []).length > 0) {
    fail('/default/inbound', 'a port of the host leads to one family: move it to /families');
  }
  const taken = new Map<string, string>();
  const numbers = new Set<number>();
  for (const [key, family] of Object.entries(value.families ?? {})) {
    const at = `/families/${key}`;
    if (/^\d+$/.test(key)) {
      if (Number(key) > FAMILY_MAX) fail(at, `family numbers go to ${FAMILY_MAX}`);
      if (numbers.has(Number(key))) fail(at, 'this family is there twice');
      numbers.add(Number(key));
    }
    checkFamily(family, at, fail);
    for (const rule of family.inbound ?? []) {
      const port = `${rule.protocol} port ${rule.port}`;
      const other = taken.get(port);
      if (other !== undefined) fail(`${at}/inbound`, `${port} leads to family ${other} already`);
      taken.set(port, key);
    }
  }
  const names = dnsNames(value).length;
  if (names > NAMES_MAX) fail('/', `${names} DNS names; at most ${NAMES_MAX} are accepted`);
  return value;
}

function checkFamily(
  family: FamilyPolicy,
  at: string,
  fail: (path: string, what: string) => never,
): void {
  const names = new Set<string>();
  const once = (path: string, name: string) => {
    if (names.has(name)) fail(path, `there are two rules ${name}; counters go by the name`);
    names.add(name);
  };
  for (const [i, rule] of (family.allow ?? []).entries()) {
    const path = `${at}/allow/${i}`;
    once(path, rule.name);
    if (rule.protocol === 'icmp' && rule.ports !== undefined) fail(path, 'ICMP has no ports');
    for (const to of rule.to) {
      if (parseBlock(to) === undefined && !isDnsName(to)) {
        fail(`${path}/to`, `${to} is no IPv4 address, no block (bits below the mask?), no name`);
      }
    }
    for (const port of rule.ports ?? []) {
      const { first, last } = parsePorts(port);
      if (first < 1 || last > 65535 || first > last) fail(`${path}/ports`, `${port} is no range`);
    }
  }
  for (const [i, rule] of (family.inbound ?? []).entries()) {
    const path = `${at}/inbound/${i}`;
    once(path, rule.name);
    for (const from of rule.from ?? []) {
      if (parseBlock(from) === undefined) fail(`${path}/from`, `${from} is no address or block`);
    }
  }
}

/** The part of a policy that holds for a family; `name` is its root parent's. */
export function policyOf(policy: NatPolicy, family: number, name?: string): FamilyPolicy {
  const families = Object.entries(policy.families ?? {});
  const found =
    families.find(([key]) => /^\d+$/.test(key) && Number(key) === family) ??
    families.find(([key]) => key === name);
  return found?.[1] ?? policy.default ?? {};
}

/** Sorted, and overlapping or touching ones joined: the kernel's interval sets want them so. */
export function joinRanges(ranges: readonly AddressRange[]): AddressRange[] {
  const out: AddressRange[] = [];
  for (const range of [...ranges].sort((a, b) => a.first - b.first)) {
    const last = out.at(-1);
    if (last !== undefined && range.first <= last.last + 1) {
      last.last = Math.max(last.last, range.last);
    } else out.push({ ...range });
  }
  return out;
}
