export {
  type ExecResult,
  Testbed,
  type TestbedHost,
  type TestbedOptions,
} from './testbed.js';
