#!/usr/bin/env bash
# Neovim 0.12 or later and Helix for the tests, into build/editors (90 MB): Debian testing's packages, unpacked beside the system with
# their own C library. Nothing is installed. (Neovim 0.11 comes as a wheel with the other test requirements.) Run it again, and it does
# nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$root/build/editors
[ ! -x "$folder/bin/hx" ] || exit 0
rm -rf "$folder"
mkdir -p "$folder"/apt/{lists,cache/archives}/partial "$folder"/{debs,root,bin}
cd "$folder"

# An apt of its own: the system's mirror, another suite, and no package installed, so that the whole closure is resolved.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/$')
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror testing main" >apt/sources.list
: >apt/status
cat >apt/apt.conf <<CONF
Dir::Etc::sourcelist "$folder/apt/sources.list"; Dir::Etc::sourceparts "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
Dir::State::Lists "$folder/apt/lists"; Dir::State::status "$folder/apt/status"; Dir::Cache "$folder/apt/cache";
Acquire::Languages "none"; APT::Sandbox::User "root";
CONF
export APT_CONFIG=$folder/apt/apt.conf
apt-get -qq update
packages=$(apt-get -s -qq --no-install-recommends install neovim hx | awk '/^Inst/ {print $2}')
(cd debs && apt-get -qq download $packages)
for package in debs/*.deb; do dpkg -x "$package" root; done

libraries=$folder/root/usr/lib/$(uname -m)-linux-gnu
for editor in nvim:VIMRUNTIME:share/nvim/runtime hx:HELIX_RUNTIME:lib/hx/runtime; do
    IFS=: read -r program variable runtime <<<"$editor"
    cat >"bin/$program.new" <<RUN
#!/bin/sh
export $variable="$folder/root/usr/$runtime"
exec "$(echo "$libraries"/ld-linux-*.so.2)" --library-path "$libraries" "$folder/root/usr/bin/$program" "\$@"
RUN
    chmod +x "bin/$program.new"
    "bin/$program.new" --version | head -1
    mv "bin/$program.new" "bin/$program"
done
rm -rf apt debs
