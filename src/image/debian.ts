export async function placeDebianTree(
  programs: string,
  tree: string,
  log: (line: string) => void,
  signal?: AbortSignal,
): Promise<void> {
  throw new Error(`x${programs}${tree}${log}${signal}`);
}
