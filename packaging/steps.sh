# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
#
# What an installation does to the host around it: read by scripts/install, and by the packages' own scripts, which have
# it below /usr/lib/nvhook.

commands='nvidia-container-runtime nvidia-container-runtime-hook nvidia-container-cli nvhook nvidia-docker'

# server_of PREFIX: the directory of an installation's server. A socket's path has 107 bytes at most.
server_of() {
    name=$(printf %s "$1" | tr / '~') # no prefix has one
    [ ${#name} -le 60 ] || name="~$(printf %s "$1" | cksum | cut -d ' ' -f 1)"
    printf '/run/nvhook/server%s\n' "$name"
}

# end_server DIR: the server there has loaded the old modules; the next start leaves a new one.
end_server() {
    pid=
    name=
    { read -r pid <"$1/pid" && read -r name <"/proc/$pid/comm"; } 2>/dev/null || :
    [ "$name" != nvhook-server ] || kill "$pid" 2>/dev/null || :
}

# forget_server DIR: nothing else below /run/nvhook is an installation's own. What is kept there about a container is for its
# poststop hook, whichever installation has that, and what is known of the driver is for all of them; a reboot empties it.
forget_server() {
    end_server "$1"
    rm -rf "$1"
    rmdir "${1%/*}/containers" "${1%/*}" 2>/dev/null || :
}

# other_installations CONFIG-DIR PREFIX ROOT: the prefixes of those that read the same config.toml, a line each. scripts/install
# has a file for each in CONFIG-DIR/installations; a package has none.
other_installations() {
    for entry in "$1/installations"/*; do
        if [ -f "$entry" ] && read -r other <"$entry" && [ "$other" != "$2" ] && [ -d "$3$other/lib/nvhook" ]; then
            printf '%s\n' "$other"
        fi
    done
    if [ "$2" != /usr ] && [ "$1" = "$3/etc/nvidia-container-runtime" ] && [ -e "$3/usr/lib/nvhook/steps.sh" ]; then echo /usr; fi
}

# is_note_of NOTE PREFIX ...: whether a note of `nvhook configure` names the commands of one of these installations.
is_note_of() {
    note=$1
    shift
    for other; do
        if grep -qsF -e "\"$other/bin/nvidia-container-runtime" -e "\"$other/share/containers/oci/hooks.d" "$note"; then return 0; fi
    done
    return 1
}

# is_note_of_others NOTE CONFIG-DIR PREFIX ROOT: an engine names another installation, and not the one at PREFIX.
is_note_of_others() {
    # shellcheck disable=SC2046 # a prefix has no spaces
    ! is_note_of "$1" "$3" && is_note_of "$1" $(other_installations "$2" "$3" "$4")
}

# warn_of_others BIN: NVIDIA's toolkit, whole or half removed, or another nvhook, which engines would find first.
warn_of_others() {
    for name in $commands; do
        found=$(command -v "$name" || :)
        [ -z "$found" ] || [ "$found" -ef "$1/$name" ] ||
            printf 'nvhook: `%s` is found before `%s`: remove it, or see `nvhook doctor`\n' "$found" "$1/$name" >&2
    done
}

# From here on for the packages.

# Bytecode that never looks at the source's time: what is installed changes with the package alone. Old bytecode, which
# would outlive its source for that reason, goes before.
compile() {
    forget_bytecode
    /usr/bin/python3 -I -m compileall -q --invalidation-mode unchecked-hash /usr/lib/nvhook ||
        echo 'nvhook: no bytecode could be made: every start takes longer' >&2
}

forget_bytecode() {
    find /usr/lib/nvhook -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || :
}

# after_install FORMER: nothing here is a reason for a package to fail. FORMER is empty at the first installation.
after_install() {
    compile
    end_server "$(server_of /usr)"
    warn_of_others /usr/bin
    /usr/bin/nvhook refresh || : # it says so where there is no driver, or half of one
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload || :
        if [ -z "$1" ]; then
            systemctl enable --now nvhook-refresh.path || :
        else
            systemctl try-restart nvhook-refresh.path || : # who has disabled it meant that
        fi
        if [ -S /run/udev/control ]; then udevadm control --reload || :; fi
    fi
    [ "$1" ] || echo 'To register the runtime in an engine: nvhook configure docker (or containerd, crio, podman)'
}

# An engine must not name a runtime that is gone: what `nvhook configure` wrote is taken out again, where it names ours. The
# command of another installation may be the first on the PATH.
before_removal() {
    directory=/etc/nvidia-container-runtime
    if [ "$(ls -A "$directory/configured" 2>/dev/null)" ]; then
        for engine in docker:daemon.json containerd:config.toml crio:99-nvhook.toml podman:99-nvhook.conf; do
            is_ours=1
            for note in "$directory/configured/${engine#*:}".*; do
                if is_note_of_others "$note" "$directory" /usr ''; then is_ours=; fi
            done
            [ ! "$is_ours" ] || /usr/bin/nvhook configure "${engine%:*}" --remove || :
        done
        for note in "$directory/configured"/*; do
            if [ -e "$note" ] && ! is_note_of_others "$note" "$directory" /usr ''; then
                printf 'nvhook: a file of an engine still names this runtime: see `%s`, and take it out\n' "$note" >&2
            fi
        done
    fi
    if [ -d /run/systemd/system ]; then systemctl disable --now nvhook-refresh.path nvhook-refresh.service || :; fi
}
