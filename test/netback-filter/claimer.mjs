// Tries to give interfaces their places, one for each line it gets: TAP FAMILY VMID. Answers each
// with `ok` or the error's code and message.
import { createInterface } from 'node:readline';
import { NetbackFilter } from '../../dist/src/netback-filter/filter.js';

const filter = await NetbackFilter.open({ uplink: 'eth0' });
process.stdout.write('ready\n');
for await (const line of createInterface({ input: process.stdin })) {
  const [tap, family, vmid] = line.split(' ');
  try {
    filter.addVm({ tap, family: Number(family), vmid: Number(vmid) });
    process.stdout.write('ok\n');
  } catch (error) {
    process.stdout.write(`${error.code} ${error.message}\n`);
  }
}
filter.close();
