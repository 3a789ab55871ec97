/**
 * A process that starts a VM, says its record, and waits to be killed. Arguments: folder of guest
 * RAM files, VmSpec as JSON, `run` or `pause`.
 */
import { join } from 'node:path';
import type { VmSpec } from '../../src/hypervisor/driver.js';
import { QemuDriver } from '../../src/hypervisor/qemu/driver.js';

const [ramFolder = '', specText = '', then] = process.argv.slice(2);
const spec = JSON.parse(specText) as VmSpec;
const driver = new QemuDriver({
  user: spec.user,
  memory: (of) => ({
    'qom-type': 'memory-backend-file',
    'mem-path': join(ramFolder, `${of.id}.ram`),
    share: true,
  }),
});
const vm = await driver.boot(spec);
if (then === 'pause') await vm.pause();
process.stdout.write(`${JSON.stringify(vm.record)}\n`);
setInterval(() => {}, 1000);
