// A vitest reporter that prints, last of all and alone on its line: "N passed, N failed".
import { writeSync } from 'node:fs';

export default class Summary {
  /**
   * @param {ReadonlyArray<import('vitest/node').TestModule>} modules
   * @param {ReadonlyArray<unknown>} unhandledErrors
   */
  onTestRunEnd(modules, unhandledErrors) {
    let passed = 0;
    let failed = unhandledErrors.length;
    for (const module of modules) {
      let failedHere = 0;
      for (const test of module.children.allTests()) {
        const { state } = test.result();
        if (state === 'passed') passed += 1;
        // Neither passed nor skipped on purpose: it did not hold.
        else if (state !== 'skipped') failedHere += 1;
      }
      // A file that cannot be loaded, or whose hooks fail, has failed even without a test.
      failed += failedHere > 0 || module.ok() ? failedHere : 1;
    }
    // Other reporters may still write: this must come after them.
    process.once('exit', () => writeSync(1, `${passed} passed, ${failed} failed\n`));
  }
}
