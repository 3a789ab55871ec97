// The whole initramfs: load the modules named in /modules.list, wait for the root disk, mount it,
// give back the memory of the initramfs and start the real init. A static program of its own and
// not a shell script, because every exec and every page it saves is boot time under emulation and
// RAM that a fork would otherwise have to carry.
//
// Kernel command line: root=/dev/NAME (default /dev/vda), ro or rw (default rw).
// Any failure is printed on the console and ends init, so that panic=-1 ends the VM at once.

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what) {
  fprintf(stderr, "initrd: %s: %s\n", what, strerror(errno));
  exit(1);
}

static void load_modules(void) {
  FILE *list = fopen("/modules.list", "re");
  if (!list) fail("/modules.list");
  char path[256];
  while (fgets(path, sizeof path, list)) {
    path[strcspn(path, "\n")] = '\0';
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail(path);
    // A module whose device is absent still loads; only a damaged image fails here.
    if (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST) fail(path);
    close(fd);
    unlink(path);
  }
  fclose(list);
}

static void wait_for(const char *device) {
  struct timespec pause = {.tv_nsec = 5 * 1000 * 1000};
  for (int i = 0; i < 6000; i++) {  // 30 s: an emulated host under load is slow
    if (access(device, F_OK) == 0) return;
    nanosleep(&pause, NULL);
  }
  errno = ETIMEDOUT;
  fail(device);
}

// The initramfs is RAM: its files are removed before the real root covers them.
static void remove_all(const char *folder) {
  DIR *dir = opendir(folder);
  if (!dir) return;
  struct dirent *entry;
  char path[512];
  while ((entry = readdir(dir))) {
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
    snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
    if (entry->d_type == DT_DIR) {
      remove_all(path);
      rmdir(path);
    } else {
      unlink(path);
    }
  }
  closedir(dir);
}

int main(void) {
  if (mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755")) fail("mount /dev");
  int console = open("/dev/console", O_RDWR);
  if (console >= 0)
    for (int fd = 0; fd < 3; fd++) dup2(console, fd);
  if (mount("proc", "/proc", "proc", 0, NULL)) fail("mount /proc");

  char line[4096] = "", root[128] = "/dev/vda";
  unsigned long flags = MS_NOATIME;
  int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
  if (fd < 0 || read(fd, line, sizeof line - 1) < 0) fail("/proc/cmdline");
  close(fd);
  umount("/proc");
  for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
    if (!strncmp(word, "root=", 5)) snprintf(root, sizeof root, "%s", word + 5);
    if (!strcmp(word, "ro")) flags |= MS_RDONLY;
  }

  load_modules();
  wait_for(root);
  if (mount(root, "/root", "ext4", flags, NULL)) fail(root);
  if (mount("/dev", "/root/dev", NULL, MS_MOVE, NULL)) fail("move /dev");
  unlink("/modules.list");
  remove_all("/modules");
  unlink("/init");
  if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
    fail("switch root");
  char *const argv[] = {"/sbin/init", NULL};
  char *const env[] = {"HOME=/", "TERM=linux", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};
  execve(argv[0], argv, env);
  fail("/sbin/init");
}
