#!/usr/bin/env bash
# Two nodes on one machine: run a command on the first of them, where HOSTFILE names both.
#
#   tests/helpers/two_nodes.sh gigatok-ds check-cluster --hostfile ...
#   tests/helpers/two_nodes.sh bash -c 'launch/train.sh ... '
#
# Each node, node-a and node-b, has a network, process numbers, a host name and an sshd of its own; a veth pair joins
# them. As on Debian, a node's own name is a loopback address to itself, so gloo needs GLOO_SOCKET_IFNAME=eth0. They
# share this machine's files, except the directory $NODE_LOCAL. Keys and configuration are temporary, ~/.ssh is not
# touched, and everything is taken down again however this ends.
#
# Needs root and Debian's packages iproute2, openssh-server, openssh-client and pdsh; without them it says what is
# missing and exits with 77.
#
# Environment: TWO_NODES_SECONDS (default 600), after which the nodes are ended; SLOTS of each node (default 2).

set -euo pipefail

missing() {
    echo "two_nodes.sh: not possible here: $1" >&2
    exit 77
}

[[ "$(id -u)" == 0 ]] || missing "network namespaces need root"
for tool in ip unshare nsenter ssh ssh-keygen pdsh; do
    type -P "$tool" >/dev/null || missing "$tool is not installed (iproute2, util-linux, openssh-client, pdsh)"
done
sshd="$(PATH="$PATH:/usr/sbin:/sbin" type -P sshd)" || missing "sshd is not installed (openssh-server)"

# The first process of the node that this process, an `unshare`, made.
first_of() {
    tr -d ' ' <"/proc/$1/task/$1/children"
}

here="$(mktemp -d /tmp/two-nodes-XXXXXX)"
names=(node-a node-b)
spaces=("gigatok-$$-a" "gigatok-$$-b")
processes=()
run_sshd_made=

clean_up() {
    local process name
    for process in "${processes[@]:0:2}"; do
        # All of a node ends with its first process; its parent, `unshare`, then ends by itself.
        kill -KILL "$(first_of "$process")" 2>/dev/null || kill -KILL "$process" 2>/dev/null || true
    done
    for process in "${processes[@]}"; do
        wait "$process" 2>/dev/null || true
    done
    for name in "${spaces[@]}"; do
        ip netns delete "$name" 2>/dev/null || true
    done
    [[ -z "$run_sshd_made" ]] || rmdir /run/sshd 2>/dev/null || true
    rm -rf "$here"
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

for name in "${spaces[@]}"; do
    ip netns add "$name" 2>/dev/null || missing "this root may not make network namespaces"
    ip -n "$name" link set lo up
done
ip -n "${spaces[0]}" link add eth0 type veth peer name eth0 netns "${spaces[1]}" 2>/dev/null ||
    missing "this kernel has no veth pairs"

[[ -d /run/sshd ]] || { mkdir /run/sshd && run_sshd_made=1; }
mkdir "$here/bin" "$here/local"
ssh-keygen -q -t ed25519 -N '' -f "$here/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$here/user_key"
cat >"$here/sshd_config" <<EOF
Port 22
HostKey $here/host_key
AuthorizedKeysFile $here/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
EOF
cat >"$here/ssh_config" <<EOF
Host *
  IdentityFile $here/user_key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
EOF
# DeepSpeed, pdsh and check-cluster call plain `ssh`: what is first on PATH.
printf '#!/bin/sh\nexec %s -F %s/ssh_config "$@"\n' "$(type -P ssh)" "$here" >"$here/bin/ssh"
chmod +x "$here/bin/ssh"

for node in 0 1; do
    other=$((1 - node))
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n10.77.0.%s %s\n' "${names[node]}" "$((other + 1))" "${names[other]}" \
        >"$here/hosts-$node"
    printf '%s slots=%s\n' "${names[node]}" "${SLOTS:-2}" >>"$here/hostfile"
    ip -n "${spaces[node]}" address add "10.77.0.$((node + 1))/24" dev eth0
    ip -n "${spaces[node]}" link set eth0 up
    ip netns exec "${spaces[node]}" unshare --pid --fork --kill-child --mount-proc --uts bash -c '
        hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs none "$3" && exec "$4" -D -f "$5" -E "$6"
    ' node "${names[node]}" "$here/hosts-$node" "$here/local" "$sshd" "$here/sshd_config" "$here/log-$node" \
        2>>"$here/log-$node" &
    processes+=($!)
done

for _ in $(seq 300); do
    listening="$(cat "$here"/log-? 2>/dev/null | grep -c 'listening on 0' || true)"
    [[ "$listening" != 2 ]] || break
    sleep 0.1
done
[[ "$listening" == 2 ]] || missing "the nodes did not start: $(cat "$here"/log-? 2>/dev/null | tail -n 1)"
first="$(first_of "${processes[0]}")"

export PATH="$here/bin:$PATH" HOSTFILE="$here/hostfile" NODE_LOCAL="$here/local"
nsenter --target "$first" --net --pid --mount --uts --wd="$PWD" \
    timeout -s KILL "${TWO_NODES_SECONDS:-600}" "$@" &
processes+=($!)
status=0
wait "${processes[2]}" || status=$?
exit "$status"
