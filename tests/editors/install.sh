#!/usr/bin/env bash
# Installs the editors that tests/editors drives, where they are not here yet. Debian; root for its packages.
#
#   tests/editors/install.sh            all of them
#   tests/editors/install.sh emacs      one of them: emacs, helix, tmux, vim, vscode
#
# Neovim and the driver of the browser come with `pip install '.[editors]'`. What is not a Debian package goes to
# ~/.cache/midfill-tests; MIDFILL_TEST_EDITORS names another folder. `pytest` starts this script where CI is set.
set -euo pipefail

CODE_SERVER=4.100.3 # VS Code 1.100.3; the last that runs on node 20
DEBIAN=http://deb.debian.org/debian
HELIX=25.07.1
# The SHA-256 sums and places in Debian's archive of Helix and its libraries (forky, amd64).
HELIX_PACKAGES='1cdce694e10473a0c86021f1ecad9b6d479bf304506ea772c2f8aa8b2f8f6979 pool/main/h/hx/hx_25.07.1+20260723+ds+~0.3.3+ds+~0.4.0+20260627+ds-3_amd64.deb
5c71715c51103beb4fbba9fe9f8dff604af6610dfa71c70bff342f54a7860803 pool/main/g/glibc/libc6_2.43-7_amd64.deb
e716dc8baad27e884c45ff83a76955047a7a9e33a80e94f9459ee996ebb800b0 pool/main/g/gcc-16/libgcc-s1_16.2.0-3_amd64.deb'

folder=${MIDFILL_TEST_EDITORS:-$HOME/.cache/midfill-tests}
mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9

# debian PACKAGE...: install those that are missing.
debian() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "install.sh: root is needed for: apt-get install ${missing[*]}" >&2
        return 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }
}

install_tmux() { debian tmux; }

# Debian 12 has Emacs 28.2, eglot 1.9, lsp-mode 8.0, package-lint 0.16 and evil 1.14.
install_emacs() { debian tmux emacs-nox elpa-eglot elpa-evil elpa-lsp-mode elpa-package-lint; }

# Debian 12 has Vim 9.0.1378.
install_vim() { debian tmux vim-nox; }

# Helix of a later Debian, unpacked with the libraries that it needs; Debian 12 has none. Debian keeps only the
# newest version of a package: when a URL is gone, name its successor here. It appears under its name when whole.
install_helix() {
    debian tmux
    local final=$folder/helix-$HELIX
    [ ! -d "$final" ] || return 0
    local partial=$final.partial package libraries
    rm -rf "$partial" && mkdir "$partial"
    while read -r sum path; do
        package=$partial/${path##*/}
        if ! /usr/lib/apt/apt-helper -q download-file "$DEBIAN/$path" "$package" "SHA256:$sum" >/dev/null; then
            echo "install.sh: $DEBIAN/$path cannot be had" >&2
            return 1
        fi
        dpkg-deb -x "$package" "$partial/root"
        rm "$package"
    done <<<"$HELIX_PACKAGES"
    libraries=$final/root/usr/lib/x86_64-linux-gnu
    cat >"$partial/hx" <<END
#!/bin/sh
export HELIX_RUNTIME='$final/root/usr/lib/hx/runtime'
exec '$libraries/ld-linux-x86-64.so.2' --library-path '$libraries' '$final/root/usr/lib/hx/hx' "\$@"
END
    chmod +x "$partial/hx"
    mv "$partial" "$final"
}

# VS Code as the npm package code-server brings it, and a browser to show it. npm's scripts stay off: those of
# code-server download what is not needed here. It appears under its name only when it is whole.
install_vscode() {
    debian chromium fonts-dejavu-core
    local final=$folder/code-server-$CODE_SERVER
    [ ! -d "$final" ] || return 0
    local partial=$final.partial
    rm -rf "$partial" && mkdir "$partial"
    echo '{"private": true}' >"$partial/package.json"
    (
        cd "$partial"
        npm install --ignore-scripts --omit=dev --no-audit --no-fund --silent "code-server@$CODE_SERVER"
        cd node_modules/code-server/lib/vscode
        npm install --ignore-scripts --omit=dev --no-audit --no-fund --silent
    )
    mv "$partial" "$final"
}

editors=("$@")
[ $# -gt 0 ] || editors=(emacs tmux vim vscode helix)
for editor in "${editors[@]}"; do
    if ! declare -F "install_$editor" >/dev/null; then
        echo "install.sh: unknown editor \"$editor\"; known are: emacs, helix, tmux, vim, vscode" >&2
        exit 2
    fi
    "install_$editor"
done
