#!/usr/bin/env bash
# Generates the C++, Java and Go stubs from the .proto files and compiles them: proto/compile_stubs.sh [cpp] [java] [go].
#
# A worker may be written in any language that has gRPC, so the contract must compile in each. A field named like a method
# that the generator adds, or a missing package option, breaks one language and leaves the others alone. The script works in
# a temporary folder and changes nothing here. `--packages` prints the Debian packages that it needs, one a line.
set -euo pipefail
cd "$(dirname "$0")"

# Java's stubs name javax.annotation.Generated, which left the JDK with version 11: hence geronimo.
CPP_PACKAGES=(protobuf-compiler libprotobuf-dev protobuf-compiler-grpc libgrpc++-dev g++)
JAVA_PACKAGES=(protobuf-compiler libprotobuf-java protobuf-compiler-grpc-java-plugin libgrpc-java
  libgeronimo-annotation-1.3-spec-java default-jdk-headless)
GO_PACKAGES=(protobuf-compiler protoc-gen-go protoc-gen-go-grpc golang-google-protobuf-dev golang-google-grpc-dev
  golang-go)

JARS=/usr/share/java
GO_SOURCES=/usr/share/gocode

fail() { echo "compile_stubs: $*" >&2; exit 1; }

# needs LANGUAGE COMMAND...: ends with the list of packages where a command is missing.
needs() {
  local language=$1 packages command
  packages="${language^^}_PACKAGES[*]"
  shift
  for command; do
    command -v "$command" >/dev/null || fail "$language needs $command; on Debian: apt-get install ${!packages}"
  done
}

compile_cpp() {
  needs cpp protoc grpc_cpp_plugin g++
  protoc --proto_path=. --cpp_out="$work/cpp" --grpc_out="$work/cpp" \
    --plugin=protoc-gen-grpc="$(command -v grpc_cpp_plugin)" "${protos[@]}"
  # The check of syntax and types alone takes half the time of a build, and finds all that a stub can have wrong.
  find "$work/cpp" -name '*.cc' -print0 | xargs -0 -P "$(nproc)" -n 1 g++ -std=c++17 -Wall -Werror -fsyntax-only -I "$work/cpp"
}

compile_java() {
  needs java protoc grpc_java_plugin javac
  protoc --proto_path=. --java_out="$work/java" --grpc-java_out="$work/java" \
    --plugin=protoc-gen-grpc-java="$(command -v grpc_java_plugin)" "${protos[@]}"
  find "$work/java" -name '*.java' -print0 | xargs -0 javac -Xlint:all,-deprecation,-processing,-path -Werror \
    -d "$work/java-classes" -classpath "$JARS/*"
}

compile_go() {
  needs go protoc protoc-gen-go protoc-gen-go-grpc go
  protoc --proto_path=. --go_out="$work/go/src" --go-grpc_out="$work/go/src" "${protos[@]}"
  # Debian ships Go libraries as sources under a GOPATH, so there is no module and no download.
  GO111MODULE=off GOFLAGS='' GOPATH="$work/go:$GO_SOURCES" GOCACHE="$work/go-cache" go vet "$go_package"
}

if [ "${1:-}" = --packages ]; then
  printf '%s\n' "${CPP_PACKAGES[@]}" "${JAVA_PACKAGES[@]}" "${GO_PACKAGES[@]}" | sort -u
  exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mapfile -t protos < <(find . -name '*.proto' -printf '%P\n' | sort)
[ "${#protos[@]}" -gt 0 ] || fail "there are no .proto files in $PWD"
go_package=$(sed -nE 's/^option go_package = "([^;"]+).*/\1/p' "${protos[0]}")
mkdir -p "$work"/{cpp,java,java-classes,go/src}

languages=("$@")
[ "$#" -gt 0 ] || languages=(cpp java go)
for language in "${languages[@]}"; do
  declare -F "compile_$language" >/dev/null || fail "expected cpp, java or go, got $language"
done
for language in "${languages[@]}"; do
  began=$SECONDS
  # Not `|| fail`: that would switch off `set -e` inside the function.
  "compile_$language"
  files=$(find "$work/$language" -type f \( -name '*.cc' -o -name '*.java' -o -name '*.go' \) | wc -l)
  [ "$files" -gt 0 ] || fail "$language: protoc wrote no stubs"
  echo "$language: $files generated files compile ($((SECONDS - began)) s)"
done
