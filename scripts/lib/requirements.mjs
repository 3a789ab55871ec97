// What set-up cannot install: the kernel, the processor, Node.js.

/**
 * Compares dotted versions by their numbers: negative, zero, positive.
 * @param {string} a
 * @param {string} b
 */
export function compareVersions(a, b) {
  const numbers = (/** @type {string} */ text) =>
    (/\d+(\.\d+)*/.exec(text)?.[0] ?? '0').split('.').map(Number);
  const [left, right] = [numbers(a), numbers(b)];
  for (let at = 0; at < Math.max(left.length, right.length); at++) {
    const difference = (left[at] ?? 0) - (right[at] ?? 0);
    if (difference !== 0) return difference;
  }
  return 0;
}

/**
 * What this machine lacks; empty when all is well.
 * @param {{ platform: string, arch: string, kernel: string, node: string }} machine
 * @returns {string[]}
 */
export function unmetRequirements({ platform, arch, kernel, node }) {
  const unmet = [];
  if (platform !== 'linux') unmet.push(`needs Linux, this is ${platform}`);
  else if (compareVersions(kernel, '6.1') < 0) {
    unmet.push(`needs Linux 6.1 or newer, this is ${kernel} (Debian 12 has 6.1)`);
  }
  if (arch !== 'x64') unmet.push(`needs an x86-64 processor, this is ${arch}`);
  if (compareVersions(node, '20.19') < 0 || compareVersions(node, '25') >= 0) {
    unmet.push(`needs Node.js 20.19 to 24, this is ${node} (see https://nodejs.org)`);
  }
  return unmet;
}
