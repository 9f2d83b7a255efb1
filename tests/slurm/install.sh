#!/usr/bin/env bash
# What the tests of Slurm need, on Debian and Ubuntu; nothing to do where it is there.
set -euo pipefail
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
if command -v munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd sacct >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "make test-slurm installs Slurm on Debian and Ubuntu only; here, install munge, MariaDB and Slurm with slurmdbd yourself." >&2
  exit 1
fi
if [ "$(id -u)" != 0 ]; then
  echo "Slurm is not installed, and only root can install it: sudo make test-slurm" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends \
  munge slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin \
  mariadb-server-core mariadb-client-core rsync
