/**
 * Our DHCP server as a process of its own, for bench dhcp: on `eth0` of the namespace it is started
 * in, with as many VMs as the load generator pretends to be. Argument: how many. Ends with its input.
 */
import { DhcpService } from '../../src/dhcp/service.js';
import { addressOfVmid, macText } from '../../src/network/addresses.js';

export const FIRST_CLIENT_MAC = 0x02_00_5f_00_00_00;

const clients = Number(process.argv[2]);
if (Number.isInteger(clients) && clients > 0) {
  const identity = (vmid: number) => ({
    address: addressOfVmid(vmid),
    guestMac: macText(FIRST_CLIENT_MAC + vmid),
    leaseSeconds: 3600,
  });
  const service = new DhcpService({
    tap: 'eth0',
    family: 1,
    relay: true,
    identity: identity(0),
    // Doubled by the kernel: what other sockets get by default (net.core.rmem_default).
    load: {
      others: Array.from({ length: clients }, (_, vmid) => identity(vmid)),
      receiveBytes: 106_496,
    },
  });
  process.stdin.resume();
  process.stdin.on('end', () => {
    process.stderr.write(`${JSON.stringify(service.stats())}\n`);
    service.stop();
  });
  process.stdout.write('ready\n');
}
