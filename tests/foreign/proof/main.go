// Command proof checks a C2SP tlog-proof with other people's code: golang.org/x/mod's sumdb/note
// for the log's signature and sumdb/tlog for the path, transparency-dev's formats for a witness's
// cosignature.
//
// Usage: proof FILE ENTRY LOGKEY [WITNESSKEY]. Exit 0: all of it holds; 1: it does not.
package main

import (
	"encoding/base64"
	"fmt"
	"os"
	"strconv"
	"strings"

	cosignature "github.com/transparency-dev/formats/note"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func parse(data string) (index int64, path tlog.RecordProof, signed string, err error) {
	head, signed, found := strings.Cut(data, "\n\n")
	lines := strings.Split(head, "\n")
	if !found || lines[0] != "c2sp.org/tlog-proof@v1" {
		return 0, nil, "", fmt.Errorf("no tlog-proof")
	}
	lines = lines[1:]
	if len(lines) > 0 && strings.HasPrefix(lines[0], "extra ") {
		lines = lines[1:]
	}
	if len(lines) == 0 || !strings.HasPrefix(lines[0], "index ") {
		return 0, nil, "", fmt.Errorf("no index")
	}
	index, err = strconv.ParseInt(strings.TrimPrefix(lines[0], "index "), 10, 64)
	for _, line := range lines[1:] {
		digest, bad := base64.StdEncoding.DecodeString(line)
		if bad != nil || len(digest) != tlog.HashSize {
			return 0, nil, "", fmt.Errorf("bad hash %q", line)
		}
		path = append(path, tlog.Hash(digest))
	}
	return index, path, signed, err
}

func check(file, entry string, keys []string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	record, err := os.ReadFile(entry)
	if err != nil {
		return err
	}
	index, path, signed, err := parse(string(data))
	if err != nil {
		return err
	}
	log, err := note.NewVerifier(keys[0])
	if err != nil {
		return err
	}
	opened, err := note.Open([]byte(signed), note.VerifierList(log))
	if err != nil {
		return err
	}
	for _, key := range keys[1:] {
		witness, err := cosignature.NewVerifierForCosignatureV1(key)
		if err != nil {
			return err
		}
		if _, err := note.Open([]byte(signed), note.VerifierList(witness)); err != nil {
			return err
		}
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[0] != log.Name() {
		return fmt.Errorf("no checkpoint of %s", log.Name())
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return err
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return fmt.Errorf("bad root hash")
	}
	leaf := tlog.RecordHash(record)
	if err := tlog.CheckRecord(path, size, tlog.Hash(root), index, leaf); err != nil {
		return err
	}
	fmt.Printf("entry %d of %s\n", index, lines[0])
	return nil
}

func main() {
	if err := check(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
