// Command bundle is a second implementation of session bundles, written from docs/trace-format.md
// ("Handing on a part"): signature and hashes by golang.org/x/mod's sumdb/note and sumdb/tlog.
//
// Usage: bundle FILE LOGKEY. Exit 0: the session is in the log and none of its entries is missing;
// 1: it is not so.
package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type entry struct {
	Kind    string  `json:"kind"`
	Prev    *string `json:"prev"`
	Session string  `json:"session"`
	Sseq    int     `json:"sseq"`
}

type walker struct {
	indices []int64
	leaves  []tlog.Hash
	proof   []tlog.Hash
}

// root walks through the part [start, end), which holds the entries low to high.
func (w *walker) root(start, end int64, low, high int) (tlog.Hash, error) {
	if low == high {
		if len(w.proof) == 0 {
			return tlog.Hash{}, fmt.Errorf("the proof is too short")
		}
		hash := w.proof[0]
		w.proof = w.proof[1:]
		return hash, nil
	}
	if end-start == 1 {
		return w.leaves[low], nil
	}
	half := int64(1)
	for half*2 < end-start {
		half *= 2
	}
	cut := low
	for cut < high && w.indices[cut] < start+half {
		cut++
	}
	left, err := w.root(start, start+half, low, cut)
	if err != nil {
		return left, err
	}
	right, err := w.root(start+half, end, cut, high)
	return tlog.NodeHash(left, right), err
}

// follow checks that the entries are one session's, from its first to its last.
func follow(session string, entries []string, leaves []tlog.Hash) error {
	for at, text := range entries {
		var one entry
		if err := json.Unmarshal([]byte(text), &one); err != nil {
			return err
		}
		first := at == 0
		if one.Session != session || one.Sseq != at || (one.Prev == nil) != first {
			return fmt.Errorf("entry %d of the session does not fit", at)
		}
		if !first && *one.Prev != hex.EncodeToString(leaves[at-1][:]) {
			return fmt.Errorf("entry %d names another one before it", at)
		}
		if (one.Kind == "session.close") != (at == len(entries)-1) {
			return fmt.Errorf("the session does not end at its end")
		}
	}
	return nil
}

func check(file, key string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	parts := strings.SplitN(string(data), "\n\n", 3)
	if len(parts) != 3 {
		return fmt.Errorf("not three parts")
	}
	lines := strings.Split(parts[0], "\n")
	if len(lines) < 3 || lines[0] != "safeconduct/bundle@v1" {
		return fmt.Errorf("no bundle")
	}
	session, named := strings.CutPrefix(lines[1], "session ")
	if !named {
		return fmt.Errorf("no session")
	}
	var w walker
	var entries []string
	for _, line := range lines[2:] {
		number, text, found := strings.Cut(line, " ")
		index, err := strconv.ParseInt(number, 10, 64)
		if !found || err != nil || strconv.FormatInt(index, 10) != number {
			return fmt.Errorf("no entry: %.40q", line)
		}
		if len(w.indices) > 0 && index <= w.indices[len(w.indices)-1] {
			return fmt.Errorf("entry %d is not in order", index)
		}
		w.indices = append(w.indices, index)
		w.leaves = append(w.leaves, tlog.RecordHash([]byte(text)))
		entries = append(entries, text)
	}
	if err := follow(session, entries, w.leaves); err != nil {
		return err
	}
	for _, line := range strings.Split(parts[1], "\n") {
		if parts[1] == "" { // the session is the whole log
			break
		}
		digest, err := base64.StdEncoding.Strict().DecodeString(line)
		if err != nil || len(digest) != tlog.HashSize {
			return fmt.Errorf("bad hash %q", line)
		}
		w.proof = append(w.proof, tlog.Hash(digest))
	}
	log, err := note.NewVerifier(key)
	if err != nil {
		return err
	}
	opened, err := note.Open([]byte(parts[2]), note.VerifierList(log))
	if err != nil {
		return err
	}
	tree, err := tlog.ParseTree([]byte("go.sum database tree\n" + strings.SplitN(opened.Text, "\n", 2)[1]))
	if err != nil {
		return err
	}
	if w.indices[len(w.indices)-1] >= tree.N {
		return fmt.Errorf("entries beyond the head")
	}
	root, err := w.root(0, tree.N, 0, len(w.indices))
	if err != nil {
		return err
	}
	if root != tree.Hash || len(w.proof) != 0 {
		return fmt.Errorf("the entries do not lead to the head")
	}
	fmt.Printf("%d entries of session %s, none is missing\n", len(entries), session)
	return nil
}

func main() {
	if err := check(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
