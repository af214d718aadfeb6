#!/usr/bin/env bash
# Build the image and try it: who it runs as, what it may write, a run on two workers, its health check, SIGTERM.
#
#   docker/build.sh                     with docker where it answers, else with buildah (root, on Debian), else podman
#   ENGINE=buildah STORE=/var/tmp/dtrain docker/build.sh       keeps images and the base there, for the next time
#
# buildah needs no daemon and no registry: it isolates by chroot, on a base that debootstrap makes. That shares network,
# processes and /dev/shm with this machine, so PID 1, networks and the health check's clock are not tried. The pip
# configuration and certificates of this machine are lent to that build; of them the image has empty mount points.
# Ends with 0, or with 77 and a reason where there is nothing to build with.
#
# Variables: ENGINE (docker, buildah, podman), IMAGE (name), BASE and TORCH_INDEX (see Dockerfile; buildah makes its
# base itself, of SUITE, from MIRROR), STORE (for buildah; default: a temporary directory, removed at the end).
set -euo pipefail

cd "$(dirname "$0")/.."
image=${IMAGE:-dtrain}
suite=${SUITE:-bookworm}
most_mb=2000
wanted='10001:10001|[dtrain]|SIGTERM|[CMD dtrain health tcp://127.0.0.1:5555 --if-any]'
arguments=(-f docker/Dockerfile -t "$image" ${TORCH_INDEX+--build-arg "TORCH_INDEX=$TORCH_INDEX"})

skip() {
  echo "docker/build.sh: skipped: $*"
  exit 77
}

fail() {
  echo "docker/build.sh: $*" >&2
  exit 1
}

facts() { # where `inspect` shows the configuration, and the health check
  echo "{{$1.User}}|{{$1.Entrypoint}}|{{$1.StopSignal}}|{{$2.Test}}"
}

judge() { # facts, size in MB
  [[ $1 == "$wanted" ]] || fail "the image is $1, and should be $wanted"
  (( $2 < most_mb )) || fail "the image has $2 MB, and should have less than $most_mb"
  echo "image $image: $1, $2 MB"
}

with_engine() {
  local check=.Config.Healthcheck
  if [[ $engine == podman ]]; then
    check=.HealthCheck
    arguments+=(--format docker --ignorefile docker/Dockerfile.dockerignore) # its own format has no health check
  fi
  "$engine" build ${BASE:+--build-arg "BASE=$BASE"} "${arguments[@]}" .
  judge "$("$engine" image inspect --format "$(facts .Config "$check")" "$image")" \
    "$(( $("$engine" image inspect --format '{{.Size}}' "$image") / 1000000 ))"
  "$engine" run --rm --interactive --init --read-only --tmpfs /tmp --shm-size 1g --cap-drop ALL \
    --security-opt no-new-privileges --network none --entrypoint python "$image" - < docker/check.py
}

with_buildah() {
  store=${STORE:-$(mktemp -d)}
  mkdir -p "$store"
  b=(buildah --root "$store/images" --runroot "$store/run")
  trap clear_up EXIT
  base=localhost/base:$suite
  "${b[@]}" inspect --type image "$base" > /dev/null 2>&1 || make_base
  lend
  "${b[@]}" build --isolation chroot --network host --pull=never --format docker --layers \
    --ignorefile docker/Dockerfile.dockerignore --build-arg BASE="$base" "${lent[@]}" "${arguments[@]}" .
  container=$("${b[@]}" from --pull=never "localhost/$image")
  local config=.Docker.Config
  judge "$("${b[@]}" inspect --type image --format "$(facts $config $config.Healthcheck)" "localhost/$image")" \
    "$(du -s --apparent-size --block-size 1000000 "$("${b[@]}" mount "$container")" | cut -f1)"
  "${b[@]}" run --isolation chroot "$container" -- python - < docker/check.py
}

make_base() {
  rm -rf "$store/rootfs"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv "$suite" "$store/rootfs" \
    ${MIRROR:+"$MIRROR"}
  rm -rf "$store"/rootfs/var/cache/apt/archives/*.deb "$store"/rootfs/var/lib/apt/lists/*
  container=$("${b[@]}" from --isolation chroot scratch)
  "${b[@]}" add --quiet "$container" "$store/rootfs" / > /dev/null
  "${b[@]}" commit --quiet --rm "$container" "$base" > /dev/null
  rm -rf "$store/rootfs"
}

lend() { # what pip is told here, and the files that this names
  python3 -m pip config list 2> /dev/null | sed -nE "s/^(:env:|global|install)\.([a-z-]+)='(.*)'$/\2 = \3/p" |
    awk -F ' = ' 'BEGIN { print "[global]" } !seen[$1]++' > "$store/pip.conf"
  lent=(-v "$store/pip.conf:/etc/pip.conf:ro")
  local word path
  for word in $(sed 's/^[a-z-]* = //' "$store/pip.conf") /etc/ssl/certs/ca-certificates.crt; do
    path=${word#file://}
    [[ $path == "$word" ]] || path=$(dirname "$path") # an index refers to files beside it
    [[ $path != /* || $path == / || ! -e $path || " ${lent[*]} " == *" $path:"* ]] || lent+=(-v "$path:$path:ro")
  done
}

clear_up() {
  "${b[@]}" rm --all > /dev/null 2>&1 || true
  [[ -n ${STORE:-} ]] || rm -rf "$store"
}

engine=${ENGINE:-}
if [[ -z $engine ]]; then
  if docker info > /dev/null 2>&1; then
    engine=docker
  elif [[ $(id -u) == 0 ]] && command -v buildah > /dev/null && command -v debootstrap > /dev/null; then
    engine=buildah
  elif podman info > /dev/null 2>&1; then
    engine=podman
  else
    skip "no docker that answers, and no podman; buildah needs root and: apt-get install buildah debootstrap"
  fi
fi
if [[ $engine == buildah ]]; then
  with_buildah
else
  with_engine
fi
