import { chmod, copyFile, mkdir, rm, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { projectRoot } from '../common/native.js';
import { run } from '../common/run.js';
import { placePrograms } from './minimal.js';

/** What the fuller image has beside the base system. */
const PACKAGES = [
  ...['systemd-sysv', 'udev', 'dbus', 'iproute2', 'iputils-ping', 'netbase', 'procps', 'kmod'],
  ...['python3', 'ca-certificates', 'curl', 'openssh-client', 'less', 'vim-tiny', 'udhcpc'],
];

/** Files of a package system that is not needed to run, and what differs from build to build. */
const REMOVED = [
  ...['var/cache/apt', 'var/lib/apt/lists', 'var/log', 'usr/share/doc', 'usr/share/man'],
  ...['usr/share/locale', 'var/cache/ldconfig', 'etc/machine-id', 'var/lib/dbus/machine-id'],
];

/**
 * Fills `tree` with a Debian system made by mmdebstrap from the sources of this host, with the
 * agent as a systemd unit. Needs root.
 */
export async function placeDebianTree(
  programs: string,
  tree: string,
  log: (line: string) => void,
  timeS: number,
  signal?: AbortSignal,
): Promise<void> {
  log('installing Debian packages with mmdebstrap (a few minutes)');
  await run(
    'mmdebstrap',
    [
      ...['--quiet', '--variant=minbase', '--mode=root', '--format=directory'],
      `--include=${PACKAGES.join(',')}`,
      ...['--dpkgopt=path-exclude=/usr/share/doc/*', '--dpkgopt=path-exclude=/usr/share/man/*'],
      ...['--dpkgopt=path-exclude=/usr/share/locale/*', '--aptopt=APT::Install-Recommends "false"'],
      ...['bookworm', tree],
    ],
    { env: { SOURCE_DATE_EPOCH: String(timeS) }, signal },
  );
  for (const path of REMOVED) await rm(join(tree, path), { recursive: true, force: true });
  // Devices are made at boot; an empty machine id is filled in then.
  for (const path of ['dev', 'proc', 'sys', 'run', 'tmp']) {
    await rm(join(tree, path), { recursive: true, force: true });
    await mkdir(join(tree, path));
  }
  await chmod(join(tree, 'tmp'), 0o1777);
  await mkdir(join(tree, 'var/log'), { recursive: true });
  await writeFile(join(tree, 'etc/machine-id'), '');
  await writeFile(join(tree, 'etc/hostname'), 'snowflock\n');
  await writeFile(join(tree, 'etc/fstab'), '/dev/vda / ext4 rw,noatime 0 0\n');
  await run('chroot', [tree, 'groupadd', '--gid', '700', 'snowflock'], { signal });
  await run('chroot', [tree, 'passwd', '-d', 'root'], { signal });

  const script = join(tree, 'etc/udhcpc/default.script');
  await copyFile(join(projectRoot, 'guest/rootfs/minimal/usr/share/udhcpc/default.script'), script);
  await chmod(script, 0o755);
  const units = join(tree, 'etc/systemd/system');
  for (const name of ['sf-agent.service', 'sf-dhcp.service']) {
    await copyFile(join(projectRoot, 'guest/rootfs/debian', name), join(units, name));
    await symlink(`/etc/systemd/system/${name}`, join(units, 'multi-user.target.wants', name));
  }
  // With --addressing dhcp: Debian's own client, and nothing of ours.
  const network = join(tree, 'etc/systemd/network');
  await mkdir(network, { recursive: true });
  await copyFile(
    join(projectRoot, 'guest/rootfs/debian/eth0.network'),
    join(network, 'eth0.network'),
  );
  const networkd = 'systemd-networkd.service';
  await mkdir(join(units, `${networkd}.d`));
  await writeFile(
    join(units, `${networkd}.d/snowflock.conf`),
    '[Unit]\nConditionKernelCommandLine=sf.addressing=dhcp\n',
  );
  await symlink(
    `/lib/systemd/system/${networkd}`,
    join(units, 'multi-user.target.wants', networkd),
  );
  // What wakes up by itself would dirty memory in every clone at the same moments.
  for (const timer of ['apt-daily.timer', 'apt-daily-upgrade.timer', 'e2scrub_all.timer']) {
    await symlink('/dev/null', join(units, timer));
  }
  await placePrograms(programs, tree);
}
