/** The sf_* calls of a guest (paper section 2.1), as they come through its channel. */
import type { GuestCall } from '../api/guest-channel.js';
import { type ErrorCode, SnowflockError } from '../common/errors.js';
import { parseRegions, setDisjoint } from './disjoint.js';
import { checkpointVm, createClones, forkVm, joinFork, killClones } from './fork.js';
import { count } from './holdings.js';
import type { Host, LiveVm } from './host.js';
import type { CloneResult, EndReport, ForkRecord } from './records.js';
import { requestTicket } from './tickets.js';
import { endSoon } from './vms.js';

/** A join may wait as long as a job takes; the guest's own limit, if it has one, comes first. */
const JOIN_LIMIT_MS = 24 * 3600 * 1000;

/** Calls being worked on, by VM and id. */
const underWay = new Map<string, Promise<Record<string, string>>>();

/**
 * Answers a call. A guest whose channel was renewed sends its unanswered calls again: it gets the
 * answer of the one that is under way, not a second fork, and not the first one half done.
 */
export function handleGuestCall(
  host: Host,
  live: LiveVm,
  call: GuestCall,
): Promise<Record<string, string>> {
  const key = `${live.record.id}/${call.id}`;
  const known = underWay.get(key);
  if (known !== undefined) return known;
  const answer = answerCall(host, live, call).finally(() => underWay.delete(key));
  underWay.set(key, answer);
  return answer;
}

async function answerCall(
  host: Host,
  live: LiveVm,
  call: GuestCall,
): Promise<Record<string, string>> {
  const { args } = call;
  const { record } = live;
  host.log.debug({ vm: record.id, verb: call.verb, args }, 'guest call');
  switch (call.verb) {
    case 'info':
      return {
        vmid: String(record.vmid),
        name: record.name,
        host: host.config.name,
        family: String(record.family),
      };
    case 'request_ticket': {
      const ticket = await requestTicket(host, live, number(args, 'n'));
      return {
        ticket: ticket.id,
        allocation: String(ticket.granted),
        vmids: ticket.vmids.join(','),
      };
    }
    case 'clone': {
      const known = forkOfCall(host, live, call.id);
      if (known !== undefined) return { vmid: '0', ...forkReply(known) };
      const fork = await forkVm(host, live, text(args, 'ticket'), call.id);
      return { vmid: '0', ...forkReply(fork) };
    }
    case 'checkpoint_parent': {
      const known = forkOfCall(host, live, call.id);
      if (known !== undefined) return { vmid: '0', checkpoint: known.id };
      const fork = await checkpointVm(host, live, call.id);
      return { vmid: '0', checkpoint: fork.id };
    }
    case 'create_clones': {
      const fork = await createClones(host, live, text(args, 'checkpoint'), text(args, 'ticket'));
      return forkReply(fork);
    }
    case 'disjoint': {
      const said = {
        ram: parseRegions(args.ram ?? ''),
        disk: parseRegions(args.disk ?? ''),
      };
      const { ram, disk } = await setDisjoint(host, live, said);
      return { ram_pages: String(count(ram)), disk_pages: String(count(disk)) };
    }
    case 'join': {
      const clones = await joinFork(host, live, text(args, 'ticket'), JOIN_LIMIT_MS);
      return { results: results(clones) };
    }
    case 'kill': {
      const which =
        args.vmid !== undefined ? { vmid: number(args, 'vmid') } : { fork: text(args, 'ticket') };
      return { killed: String(await killClones(host, live, which)) };
    }
    case 'exit': {
      if (record.parent === null) {
        throw new SnowflockError('E_STATE', 'only a clone can sf_exit; shut the parent down');
      }
      const status = number(args, 'status') & 0xff;
      // Not awaited: the VM that would read the answer is the one that ends.
      endSoon(host, record.id, { status, reason: 'exit', message: `exit status ${status}` });
      return {};
    }
    default:
      throw new SnowflockError('E_ARGUMENT', `no such call: ${call.verb}`);
  }
}

/** A call seen before: the daemon that answered it died before the guest had the answer. */
function forkOfCall(host: Host, live: LiveVm, id: string): ForkRecord | undefined {
  return host.forks.all().find((fork) => fork.vm === live.record.id && fork.pending === id);
}

function forkReply(fork: ForkRecord): Record<string, string> {
  const started = fork.clones.filter((clone) => clone.ok).map((clone) => clone.vmid);
  return {
    fork: fork.id,
    ticket: fork.ticket ?? '',
    started: String(started.length),
    vmids: started.join(','),
    results: results(fork.clones),
  };
}

const CODE_OF_END: Record<EndReport['reason'], ErrorCode> = {
  exit: 'E_CLOSED',
  shutdown: 'E_CLOSED',
  killed: 'E_INTERRUPTED',
  crashed: 'E_QEMU',
  lost: 'E_SOURCE_LOST',
  failed: 'E_CLONE_START',
};

/** `vmid:outcome` of clones that have ended: the status given to sf_exit, or a code. */
function results(clones: CloneResult[]): string {
  return clones
    .filter(({ end }) => end !== null)
    .map(({ vmid, end, error }) => {
      if (end === null) return '';
      return `${vmid}:${end.status ?? error?.code ?? CODE_OF_END[end.reason]}`;
    })
    .join(',');
}

function text(args: Record<string, string>, name: string): string {
  const value = args[name];
  if (value === undefined || value === '') {
    throw new SnowflockError('E_ARGUMENT', `the call lacks ${name}`);
  }
  return value;
}

function number(args: Record<string, string>, name: string): number {
  const value = Number(text(args, name));
  if (!Number.isInteger(value) || value < 0) {
    throw new SnowflockError('E_ARGUMENT', `${name} must be a whole number`);
  }
  return value;
}
