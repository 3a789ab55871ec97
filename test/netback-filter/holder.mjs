// A process that attaches the filter to eth0, adds VMs and waits to be killed:
// node holder.mjs ADDON OBJECT VMS-AS-JSON
import { createRequire } from 'node:module';

const [addon, object, vms] = process.argv.slice(2);
const netback = createRequire(import.meta.url)(addon);
const filter = await netback.attach(object, 'eth0');
for (const vm of JSON.parse(vms)) filter.addVm(vm);
process.stdout.write('ready\n');
setInterval(() => filter, 1 << 30);
