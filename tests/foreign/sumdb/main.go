// Command sumdb checks a trace with the Go checksum database's own code: golang.org/x/mod's
// sumdb/note for the signature and sumdb/tlog for an inclusion proof of every entry.
//
// Usage: sumdb TRACE KEYLINE. Exit 0: every entry is in the signed tree; 1: it is not.
package main

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// tiles reads C2SP tlog-tiles from a folder for tlog.TileHashReader, which asks for height 8.
type tiles struct{ root string }

func (t tiles) Height() int                     { return 8 }
func (t tiles) SaveTiles([]tlog.Tile, [][]byte) {}
func (t tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	var all [][]byte
	for _, tile := range wanted {
		// tlog paths are tile/<height>/<level>/<N>; tlog-tiles has no height in them.
		path := strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
		data, err := os.ReadFile(filepath.Join(t.root, path))
		if err != nil {
			return nil, err
		}
		all = append(all, data)
	}
	return all, nil
}

func check(root, key string) error {
	verifier, err := note.NewVerifier(key)
	if err != nil {
		return err
	}
	raw, err := os.ReadFile(filepath.Join(root, "checkpoint"))
	if err != nil {
		return err
	}
	opened, err := note.Open(raw, note.VerifierList(verifier))
	if err != nil {
		return err
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 {
		return fmt.Errorf("checkpoint has %d lines", len(lines)-1)
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return err
	}
	digest, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || len(digest) != tlog.HashSize {
		return fmt.Errorf("bad root hash")
	}
	tree := tlog.Tree{N: size, Hash: tlog.Hash(digest)}
	reader := tlog.TileHashReader(tree, tiles{root})
	for first := int64(0); first < size; first += 256 {
		if err := checkBundle(root, tree, reader, first); err != nil {
			return err
		}
	}
	fmt.Printf("%d entries of %s\n", size, lines[0])
	return nil
}

func checkBundle(root string, tree tlog.Tree, reader tlog.HashReader, first int64) error {
	width := min(256, tree.N-first)
	path := tlog.Tile{H: 8, L: -1, N: first / 256, W: int(width)}.Path()
	path = strings.Replace(path, "tile/8/data/", "tile/entries/", 1)
	bundle, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		return err
	}
	for index := first; index < first+width; index++ {
		if len(bundle) < 2 || len(bundle) < 2+int(binary.BigEndian.Uint16(bundle)) {
			return fmt.Errorf("%s is cut off", path)
		}
		length := int(binary.BigEndian.Uint16(bundle))
		proof, err := tlog.ProveRecord(tree.N, index, reader)
		if err != nil {
			return err
		}
		leaf := tlog.RecordHash(bundle[2 : 2+length])
		if err := tlog.CheckRecord(proof, tree.N, tree.Hash, index, leaf); err != nil {
			return fmt.Errorf("entry %d: %w", index, err)
		}
		bundle = bundle[2+length:]
	}
	if len(bundle) != 0 {
		return fmt.Errorf("%s goes on", path)
	}
	return nil
}

func main() {
	if err := check(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
