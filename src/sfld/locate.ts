import { SnowflockError } from '../common/errors.js';
import type { Host } from './host.js';
import type { VmSummary } from './peers.js';

/** VMs of all hosts that answer, and the hosts that do not. */
export async function listAll(
  host: Host,
): Promise<{ vms: VmSummary[]; unreachable: { host: string; message: string }[] }> {
  const unreachable: { host: string; message: string }[] = [];
  const lists = await Promise.all(
    host.peers.all().map((port) =>
      port.list().catch((error: unknown) => {
        unreachable.push({ host: port.name, message: String(error) });
        return [];
      }),
    ),
  );
  const vms = lists.flat().sort((a, b) => a.family - b.family || a.vmid - b.vmid);
  return { vms, unreachable };
}

/** Finds a VM of the cluster by id or name, this host first. Errors: E_NOT_FOUND. */
export async function locate(host: Host, ref: string): Promise<{ host: string; vm: string }> {
  const here = host.vms.all().find((vm) => vm.id === ref || vm.name === ref);
  if (here !== undefined) return { host: host.config.name, vm: here.id };
  const { vms, unreachable } = await listAll(host);
  const found = vms.find((vm) => vm.id === ref || vm.name === ref);
  if (found !== undefined) return { host: found.host, vm: found.id };
  const hidden = unreachable.map((one) => one.host).join(', ');
  throw new SnowflockError(
    'E_NOT_FOUND',
    `no VM ${ref} in this cluster${hidden === '' ? '' : ` (no answer from ${hidden})`}`,
  );
}
