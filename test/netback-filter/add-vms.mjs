// Adds VMs to the filter that is on eth0: node add-vms.mjs VMS-AS-JSON
import { NetbackFilter } from '../../dist/src/netback-filter/filter.js';

const filter = await NetbackFilter.open({ uplink: 'eth0' });
for (const vm of JSON.parse(process.argv[2])) filter.addVm(vm);
filter.close();
